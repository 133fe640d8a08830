"""One file per loop; the Distiller of each method by name."""

from __future__ import annotations

import importlib

from fewstep.distill.distiller import Distiller

MATCHING = "fewstep.distill.methods.distribution_matching:DistributionMatching"

DISTILLERS = {
    "dmd2": MATCHING,
    "lcm": "fewstep.distill.methods.consistency:Consistency",
    "pretrain": "fewstep.distill.methods.pretrain:Pretrain",
    "sid": MATCHING,
    "sid_fewstep": MATCHING,
    "sim": MATCHING,
    "swiftbrush": MATCHING,
    "uni_instruct": MATCHING,
}


def distiller(method: str) -> type[Distiller]:
    """The Distiller class of a method."""
    module, name = DISTILLERS[method].split(":")
    return getattr(importlib.import_module(module), name)
