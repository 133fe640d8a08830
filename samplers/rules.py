"""Step rules: from x_t and a prediction of clean data to the law of x_s, s < t.

A rule is a pure function that returns (mean, std): std is 0 where the step is deterministic, and a tensor that
broadcasts over x otherwise. `plan.sample` adds the noise; the same pair gives a step's log-density.
Times t, s: (), (B,) or (B, frames). `z`, the noise that the whole trajectory started from, is used by one rule only.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fewstep.samplers.noise import NoiseProcess


class Rule(Protocol):
    """(x_t, x0, t, s, noise) -> (mean, std)."""

    def __call__(
        self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor | float]: ...


def ode(
    x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess, z: Tensor | None = None
) -> tuple[Tensor, float]:
    """DDIM (arXiv:2010.02502, eta = 0), which for flows is Euler: alpha_s x0 + sigma_s eps."""
    alpha_s, sigma_s = noise.levels(s, x_t)
    return alpha_s * x0 + sigma_s * noise.eps_of_x0(x0, x_t, t), 0.0


def consistency(
    x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Renoise the prediction with fresh noise (multistep consistency sampling, arXiv:2303.01469, algorithm 1)."""
    alpha_s, sigma_s = noise.levels(s, x_t)
    return alpha_s * x0, sigma_s


def tcd(
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    noise: NoiseProcess,
    z: Tensor | None = None,
    gamma: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Jump along the ODE to (1 - gamma) s, then renoise to s (TCD, arXiv:2402.19159); 0 is `ode`, 1 `consistency`."""
    m = (1 - gamma) * s
    jump, _ = ode(x_t, x0, t, m, noise)
    alpha_m, sigma_m = noise.levels(m, x_t)
    alpha_s, sigma_s = noise.levels(s, x_t)
    a = alpha_s / alpha_m
    return a * jump, (sigma_s.square() - (a * sigma_m).square()).clamp(min=0).sqrt()


def sde(
    x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ancestral: the posterior of x_s given x_t and x0 (DDPM; DDIM with eta = 1)."""
    alpha_t, sigma_t = noise.levels(t, x_t)
    alpha_s, sigma_s = noise.levels(s, x_t)
    a = alpha_t / alpha_s
    b2 = (sigma_t.square() - (a * sigma_s).square()).clamp(min=0)
    tail = sigma_s.square() / sigma_t.square()  # share of x_t's noise that x_s keeps, times the ratio of variances
    mean = a * tail * x_t + alpha_s * (b2 / sigma_t.square()) * x0
    return mean, (tail * b2).sqrt()


def same_noise(
    x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess, z: Tensor | None = None
) -> tuple[Tensor, float]:
    """Alpha_s x0 + sigma_s z with the trajectory's first noise (improved rectified flow, arXiv:2405.20320)."""
    if z is None:
        raise ValueError("same_noise needs the first noise z")
    alpha_s, sigma_s = noise.levels(s, x_t)
    return alpha_s * x0 + sigma_s * z, 0.0


def clipped(x_t: Tensor, x0: Tensor, t: Tensor, noise: NoiseProcess) -> tuple[Tensor, Tensor]:
    """Both as a scheduler with `clip_sample` steps on: x0 in its range, x_t with the noise of the unclipped prediction."""
    if noise.clip_range is None:
        return x_t, x0
    bound = x0.clamp(-noise.clip_range, noise.clip_range)
    return x_t + noise.levels(t, x_t)[0] * (bound - x0), bound


RULES = {"ode": ode, "consistency": consistency, "tcd": tcd, "sde": sde, "same_noise": same_noise}


def add_noise(mean: Tensor, std: Tensor | float, generators: list[torch.Generator]) -> Tensor:
    """Mean + std xi, one generator per row; draws nothing where std is 0."""
    if isinstance(std, float) and std == 0.0:
        return mean
    return mean + std * randn(mean.shape, generators).to(mean)


def randn(shape: torch.Size | tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Standard normal of `shape` (B, ...), row i from generator i, as diffusers' `randn_tensor` draws it."""
    # on the CPU: one seed gives the same noise on every device, in every batch and place
    return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generators])
