"""At which levels networks are called: where students start, what is trained, and how many steps are walked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.distill.config import DenoisingConfig
from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.random import Rngs
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import Discrete, Flow, NoiseProcess
from fewstep.samplers.plan import SamplingPlan, uniform_plan


def start_scale(noise: NoiseProcess) -> float:
    """Factor of the standard normal that sampling starts from: 1 as pipelines do, sigma(1) where variance explodes.

    Stable Diffusion starts from N(0, I) although its sigma(1) is 0.9977.
    """
    return max(1.0, float(noise.sigma(torch.ones(()))))


def even_levels(noise: NoiseProcess, steps: int, top: float = 1.0, ends: Sequence[float] = ()) -> list[float]:
    """Top times 1, 1 - 1/K, ..., 1/K before the shift; of a table of N levels the nearest multiples of 1/N.

    At top = 1 the grid of DMD2 and of diffusers' trailing spacing; stock schedulers step through entries of the table
    only. `ends`, decreasing: as many steps down to each, evenly, as to the next and to 0.
    """
    each = steps // (len(ends) + 1)
    levels = [a * (1 - i / each) + b * i / each for a, b in pairwise((top, *ends, 0.0)) for i in range(each)]
    return [round(v * noise.n) / noise.n for v in levels] if isinstance(noise, Discrete) else levels


def first_level(config: DistributionMatchingConfig, noise: NoiseProcess) -> float:
    """Of the student's first call; of a table an entry."""
    top = config.init_level or (signal_lost(noise) if config.start == "level" else 1.0)
    return even_levels(noise, 1, top)[0]


def ends(config: DistributionMatchingConfig, noise: NoiseProcess) -> list[float]:
    """Where steps of the student's trajectories end before their last, decreasing; none of other policies."""
    if config.policy != "trajectory":
        return []
    first = first_level(config, noise)
    inner = (v for k in config.steps for v in even_levels(noise, k, first - config.below_top(k))[1:])
    return sorted(set(inner), reverse=True)


def signal_lost(noise: NoiseProcess, ratio: float = 2.5) -> float:
    """Level, before the shift, where sigma / alpha = 2.5; 1 of flows, and where it stays below.

    There SiD's students are called first (arXiv:2404.04057, 2406.01561): index 625 of Stable Diffusion's table.
    """
    if isinstance(noise, Flow):
        return 1.0
    n = noise.n if isinstance(noise, Discrete) else 100_000
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    return float(t[(noise.sigma(t) / noise.alpha(t) - ratio).abs().argmin()])


def training_level(config: DenoisingConfig, rng: Rngs) -> Tensor:
    """Before a flow's shift, (B,) in (0, 1]: uniform, or with a normal logit (arXiv:2403.03206, eq. 19)."""
    if config.weighting_scheme == "none":
        return 1 - rng.uniform("level")
    return (config.logit_mean + config.logit_std * rng.normal("level", ())).sigmoid()


def many_steps(denoiser: Denoiser, steps: int, guidance: float | None) -> SamplingPlan:
    """The guided ODE on even levels, for what is no student of few steps."""
    guidance, scale = 1.0 if guidance is None else guidance, start_scale(denoiser.noise)
    if denoiser.takes_guidance:
        return uniform_plan(steps, initial_scale=scale, embedded_guidance=guidance)
    return uniform_plan(steps, guidance, initial_scale=scale)
