"""Gaussian roles in float64, with noises of which every mean of a quadratic is exact: what analytic gradients are held to.

Teacher N(m, S^2), student b + c z, fake score of N(b', c'^2). With a = alpha, s = sigma, v_T = a^2 S^2 + s^2 and v_F
likewise, the predictions at x_t = a (b + c z) + s eps are m + (a S^2 / v_T)(x_t - a m) and b' + (a c'^2 / v_F)(x_t - a b').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.distiller import Batch
from fewstep.distill.methods.distribution_matching import DistributionMatching, Draws
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import NoiseProcess
from tests.distill.gaussian import PROCESSES, Teacher, method

SHIFT = 0.5  # of the prompt (exact in float32): the guided teacher's mean is m + g SHIFT
RATIOS = (0.1, 0.5, 1.0, 3.0)
"""Sigma over alpha at the four levels that are looked at: even ones of an EDM would have next to no noise."""
Z, EPS = torch.tensor(
    [[1, 1, -1, -1], [1, -1, 1, -1]]
).double()  # means of 1, z, eps, their squares and product are exact


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-6, floor: float = 1e-6) -> None:
    """Each number by itself, and none so small that rounding would be compared with rounding."""
    assert expected.abs().min() > floor
    assert ((actual - expected) / expected).abs().max() < tolerance


def at(noise: NoiseProcess, *ratios: float) -> Tensor:
    """Levels t where sigma / alpha is near to each of the ratios, float64."""
    t = torch.linspace(0, 1, 10_001).double()
    gaps = noise.sigma(t) / noise.alpha(t) - torch.tensor(ratios).double()[:, None]
    return t[gaps.abs().argmin(1)]


@dataclass
class Laws:
    """Teacher N(m, S^2) guided to m + g SHIFT, student N(b, c^2)."""

    m: float = 0.7
    S: float = 0.5
    b: float = 0.2
    c: float = 0.9


def prompts_of(teacher: Denoiser, prompts: Sequence[str]) -> Batch:
    return Batch(list(prompts), teacher.latent_shape(), teacher.encode(prompts))


def gaussian(made: DistributionMatching, mean: float | Tensor, std: float | Tensor, gain: float = 0.0) -> None:
    """Make the fake score the exact one of N(mean, std^2); `gain`: how far the prompt moves the mean."""
    with torch.no_grad():
        for network in made.fake_score.denoiser.networks.values():
            network.mean.copy_(torch.as_tensor(mean, dtype=torch.float64).expand_as(network.mean))
            network.log_std.copy_(torch.as_tensor(std, dtype=torch.float64).log().expand_as(network.log_std))
            network.gain.fill_(gain)


def exact(
    folder: Path, process: str, laws: Laws, teacher: type[Teacher] = Teacher, **changes: Any
) -> DistributionMatching:
    """A method of the family in float64 whose fake score is the student's own."""
    made = method(folder, teacher(PROCESSES[process], [laws.m], [laws.S], side=1), **changes)
    for role in made.roles().values():
        for network in role.denoiser.networks.values():
            network.double()
    with torch.no_grad():  # in float32 these are off by 1e-8
        for network in made.teacher.denoiser.networks.values():
            network.mean.fill_(laws.m)
            network.log_std.fill_(math.log(laws.S))
    gaussian(made, laws.b, laws.c)
    return made


def rows(made: DistributionMatching, laws: Laws) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Batch, samples, levels and noises, four rows a level, (16, 1, 1, 1)."""
    z, eps = (v.repeat(4).reshape(16, 1, 1, 1) for v in (Z, EPS))
    t = at(made.noise, *RATIOS).repeat_interleave(4)
    return prompts_of(made.teacher.denoiser, [str(SHIFT)] * 16), laws.b + laws.c * z, t, eps


def on_the_sample(made: DistributionMatching, batch: Batch, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the student's loss does to its sample, times the number of elements: the direction."""
    x0 = x0.detach().clone().requires_grad_(True)
    (losses,) = made.loss("student", batch, Draws(x0, {"student": t}, {"student": eps}), 0)
    (gradient,) = torch.autograd.grad(losses.total, x0)
    return gradient * x0.numel()


def moments(made: DistributionMatching, laws: Laws) -> tuple[Tensor, Tensor]:
    """E d and E d z at each level: the loss's derivatives in b and c."""
    d = on_the_sample(made, *rows(made, laws)).reshape(4, 4)
    return d.mean(1), (d * Z).mean(1)


def levels(made: DistributionMatching) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of the four levels."""
    t = at(made.noise, *RATIOS)
    return made.noise.alpha(t), made.noise.sigma(t)
