"""A teacher whose data are an even mixture of Gaussians, exact too: a posterior is that of its modes, by how likely each is."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import NoiseProcess
from tests.closed_form import shifts


class MixtureNetwork(nn.Module):
    """The exact raw prediction for an even mixture of Gaussians, plus a small network's correction that starts at zero.

    Only the correction is trainable: copies of the teacher's network are a student and a fake score that start where
    it is, as in practice, and that can become nearly anything.

    Args:
        noise: turns model time into levels.
        means: of the modes, (M, C).
        std: of each.
        width: of the correction's hidden layers.
        seed: of their weights.
    """

    def __init__(self, noise: NoiseProcess, means: Tensor, std: float, width: int = 64, seed: int = 0):
        super().__init__()
        self.noise, self.means, self.std = noise, means, std
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(means.shape[1] + 2, width)
            self.second = nn.Linear(width, width)
            self.third = nn.Linear(width, width)
            self.last = nn.Linear(width, means.shape[1])
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.last.weight.dtype

    def forward(self, x_t: Tensor, time: Tensor, shift: Tensor) -> Tensor:
        """(B, C, ...), every place a sample of its own in C dimensions; model time and shift (B,)."""
        t = self.noise.from_model_time(time).to(x_t.dtype)
        means = self.means + shift.reshape(-1, *[1] * x_t.ndim)
        x0, eps = mixture_posterior(self.noise, x_t, t, means, self.std)
        exact = self.noise.output(x0, eps, t)
        alpha, sigma = (v.expand(len(x_t), 1, *x_t.shape[2:]) for v in self.noise.levels(t, x_t))
        h = self.first(torch.cat([x_t, alpha, sigma], 1).movedim(1, -1))
        h = self.third(silu(self.second(silu(h))))
        return exact + self.last(silu(h)).movedim(-1, 1)


def mixture_posterior(noise: NoiseProcess, x_t: Tensor, t: Tensor, means: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Exact E[x0 | x_t] and E[eps | x_t] for data of an even mixture of N(mean, std^2), at each place of x_t (B, C, ...).

    The means broadcast against (B, ..., M, C).
    """
    x = x_t.movedim(1, -1).unsqueeze(-2)  # (B, ..., 1, C)
    alpha, sigma = noise.levels(t, x)
    v = alpha**2 * std**2 + sigma**2
    off = x - alpha * means
    w = (-off.square().sum(-1, keepdim=True) / (2 * v)).softmax(-2)
    x0 = (w * (means + alpha * std**2 / v * off)).sum(-2)
    eps = (w * sigma / v * off).sum(-2)
    return x0.movedim(-1, 1), eps.movedim(-1, 1)


class MixtureTeacher(Denoiser):
    """A Denoiser over `MixtureNetwork`: a sample is side x side points of an even mixture, (C, side, side).

    Prompts are as of GaussianTeacher: a number moves every mode by it, along each axis.

    Args:
        noise: any process.
        means: of the modes, (M, C).
        std: of each.
        side: see above; a batch is many draws.
        boundary: level from which on a network of its own, "high", predicts, and below which "low" does; none: one network.
    """

    network_names = ("network",)
    takes_lora = False

    def __init__(self, noise: NoiseProcess, means: Tensor, std: float, side: int = 8, boundary: float | None = None):
        self._noise, self.means, self.std, self.side, self.boundary = noise, means, std, side, boundary
        names = ("network",) if boundary is None else ("high", "low")
        networks = {n: MixtureNetwork(noise, means, std) for n in names}
        super().__init__(SimpleNamespace(components=networks), networks)

    def noise_process(self, latent_shape: tuple[int, ...] | None) -> NoiseProcess:
        return self._noise

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        return shifts(prompts)

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return network(x_t, time, condition.tensors["shift"].to(x_t))

    @property
    def boundaries(self) -> tuple[float, ...]:
        return () if self.boundary is None else (self.boundary,)

    def route(self, time: Tensor) -> dict[str, Tensor]:
        if self.boundary is None:
            return super().route(time)
        high = self.noise.from_model_time(time) >= self.boundary
        sides = {"high": high.nonzero()[:, 0], "low": (~high).nonzero()[:, 0]}
        return {name: rows for name, rows in sides.items() if len(rows)}

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        return ("third",)

    def feature(self, output: Tensor) -> Tensor:
        return output.movedim(-1, 1)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        return self.means.shape[1], self.side, self.side

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Data, (n, C, side, side)."""
        which = torch.randint(len(self.means), (n, self.side, self.side), generator=generator)
        noise = torch.randn((n, *self.latent_shape()), generator=generator)
        return self.means[which].movedim(-1, 1) + self.std * noise


def ring(modes: int, radius: float) -> Tensor:
    """Points at even angles on a circle, (modes, 2)."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)
