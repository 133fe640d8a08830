"""Where students start, and at which levels they are called."""

from __future__ import annotations

import torch

from fewstep.samplers.noise import Discrete, NoiseProcess


def start_scale(noise: NoiseProcess) -> float:
    """Factor of the standard normal that sampling starts from: 1 as pipelines do, sigma(1) where variance explodes.

    Stable Diffusion starts from N(0, I) although its sigma(1) is 0.9977.
    """
    return max(1.0, float(noise.sigma(torch.ones(()))))


def even_levels(noise: NoiseProcess, steps: int) -> list[float]:
    """1, 1 - 1/K, ..., 1/K before the shift; of a table of N levels the nearest multiples of 1/N.

    The grid of DMD2 and of diffusers' trailing spacing; stock schedulers step through entries of the table only.
    """
    levels = [1 - i / steps for i in range(steps)]
    return [round(v * noise.n) / noise.n for v in levels] if isinstance(noise, Discrete) else levels
