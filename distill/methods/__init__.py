"""One file per loop; the Distiller of each method by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from fewstep.distill.distiller import Distiller
from fewstep.distill.train_config import TrainConfig
from fewstep.samplers.denoisers.base import Denoiser

MATCHING = "fewstep.distill.methods.distribution_matching:DistributionMatching"

DISTILLERS = {
    "disback": "fewstep.distill.methods.disback:DisBack",
    "dmd": MATCHING,
    "dmd2": MATCHING,
    "lcm": "fewstep.distill.methods.consistency:Consistency",
    "phased_dmd": MATCHING,
    "pretrain": "fewstep.distill.methods.pretrain:Pretrain",
    "sid": MATCHING,
    "sid_fewstep": MATCHING,
    "sim": MATCHING,
    "swiftbrush": MATCHING,
    "tdm": MATCHING,
    "tsm": "fewstep.distill.methods.tsm:TeacherScoreMatching",
    "uni_instruct": MATCHING,
}


def distiller(method: str) -> type[Distiller]:
    """The Distiller class of a method."""
    module, name = DISTILLERS[method].split(":")
    return getattr(importlib.import_module(module), name)


def why_not(config: TrainConfig, backbone: type[Denoiser], networks: Sequence[str] | None = None) -> str | None:
    """Why a config's method trains no such students of a backbone; None where it does.

    Args:
        config: of the method.
        backbone: the teacher's class.
        networks: those that the teacher itself has, where its class may have several; default: all of them.
    """
    if config.method == "tsm" and config.student == "lora":
        return "a network of another size is no LoRA: set student: full"
    if getattr(config, "policy", None) == "phases" and len(networks or backbone.network_names) < 2:
        if not backbone.takes_lora:
            return "needs a network for each phase, as Wan 2.2 has, or a pipeline that loads a LoRA for each"
        if config.student == "full":
            return "phases of a teacher with one network (as Wan 2.1) are LoRAs: set student: lora"
    return None
