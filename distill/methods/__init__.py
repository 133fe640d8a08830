"""One file per loop; the Distiller of each method by name."""

from __future__ import annotations

import importlib

from fewstep.distill.distiller import Distiller

DISTILLERS = {
    "dmd2": "fewstep.distill.methods.distribution_matching:DistributionMatching",
    "lcm": "fewstep.distill.methods.consistency:Consistency",
    "pretrain": "fewstep.distill.methods.pretrain:Pretrain",
}


def distiller(method: str) -> type[Distiller]:
    """The Distiller class of a method."""
    module, name = DISTILLERS[method].split(":")
    return getattr(importlib.import_module(module), name)
