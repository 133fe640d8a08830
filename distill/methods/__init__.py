"""One file per loop; the Distiller of each method by name."""

from __future__ import annotations

import importlib

from fewstep.distill.distiller import Distiller
from fewstep.samplers.denoisers.base import Denoiser

DISTILLERS = {
    "dmd2": "fewstep.distill.methods.distribution_matching:DistributionMatching",
    "lcm": "fewstep.distill.methods.consistency:Consistency",
    "pretrain": "fewstep.distill.methods.pretrain:Pretrain",
}


def distiller(method: str) -> type[Distiller]:
    """The Distiller class of a method."""
    module, name = DISTILLERS[method].split(":")
    return getattr(importlib.import_module(module), name)


def why_not(method: str, backbone: type[Denoiser]) -> str | None:
    """Why a method trains no students of a backbone; None where it trains them, as LoRA and with full weights."""
    if backbone.clips and "images" in distiller(method).needs:
        return "needs clips for this teacher, and train_data has images only"
    return None
