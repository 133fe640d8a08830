"""A teacher whose every prediction is exact: data N(mean + shift(prompt), std^2), independent entries.

With c the entry's mean, k = alpha std^2 / (alpha^2 std^2 + sigma^2):

    E[x0 | x_t] = c + k (x_t - alpha c),   E[eps | x_t] = sigma / (alpha^2 std^2 + sigma^2) (x_t - alpha c).

Both are affine in c, so guidance of scale w between shifts u and s is the teacher of shift u + w (s - u).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import NoiseProcess


class GaussianNetwork(nn.Module):
    """The raw prediction of `noise.prediction_type`, as a pipeline's network gives it; every number is trainable.

    Untrained it is exact. `mean`, `log_std` and `gain` (how far the condition's shift moves the mean) make it any
    Gaussian score: what a fake score must become. `scale`, `offset` and `tilt` are corrections of the prediction,
    `scale x_t + offset + tilt shift`, linear in t between `knots` + 1 even levels: what a student must become.

    Args:
        noise: turns model time into levels.
        mean: broadcastable to one sample (C, ...).
        std: the same, positive.
        knots: number of intervals of the corrections; at knots = K the levels i / K are independent of each other.
        shape: of one sample; corrections are one number per entry.
        guided: with a guidance input w the shift becomes shift (1 + guided (w - 1)); 1 is what guidance of scale w
            against shift 0 gives, 0 ignores it, None has no such input.
    """

    config: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        noise: NoiseProcess,
        mean: Tensor,
        std: Tensor,
        knots: int,
        shape: tuple[int, ...],
        guided: float | None = None,
    ):
        super().__init__()
        self.noise = noise
        self.mean = nn.Parameter(mean.clone())
        self.log_std = nn.Parameter(std.log())
        self.gain = nn.Parameter(torch.ones(()))
        self.guided = None if guided is None else nn.Parameter(torch.tensor(guided))
        self.scale = nn.Parameter(torch.zeros(knots + 1, *shape))
        self.offset = nn.Parameter(torch.zeros(knots + 1, *shape))
        self.tilt = nn.Parameter(torch.zeros(knots + 1, *shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.mean.dtype

    def forward(self, x_t: Tensor, time: Tensor, shift: Tensor, guidance: Tensor | None = None) -> Tensor:
        """(B, ...), model time (B,) or (B, frames), shift (B,), guidance (B,) or None."""
        t = self.noise.from_model_time(time).to(x_t.dtype)
        rows = (-1, *[1] * (x_t.ndim - 1))
        moved = shift if self.guided is None or guidance is None else shift * (1 + self.guided * (guidance - 1))
        mean = self.mean + self.gain * moved.reshape(rows)
        x0, eps = posterior(self.noise, x_t, t, mean, self.log_std.exp())
        exact = self.noise.output(x0, eps, t)
        scale, offset, tilt = (self._at(t, table) for table in (self.scale, self.offset, self.tilt))
        return exact + scale * x_t + offset + tilt * moved.reshape(rows)

    def _at(self, t: Tensor, table: Tensor) -> Tensor:
        """Linear interpolation of a table over t, (B, ...); with a time per frame that of the first frame."""
        position = (t if t.ndim == 1 else t[:, 0]) * (len(table) - 1)
        low = position.detach().floor().long().clamp(0, max(len(table) - 2, 0))
        high = (low + 1).clamp(max=len(table) - 1)
        weight = (position - low).reshape(-1, *[1] * (table.ndim - 1))
        return table[low] + weight * (table[high] - table[low])


def posterior(noise: NoiseProcess, x_t: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Exact E[x0 | x_t] and E[eps | x_t] for data N(mean, std^2), both broadcastable over x_t (B, ...)."""
    alpha, sigma = noise.levels(t, x_t)
    rest = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    return mean + alpha * std**2 * rest, sigma * rest


def shifts(prompts: list[str]) -> dict[str, Tensor]:
    """Prompts that are numbers, or "" for 0, as the condition `shift`, (B,)."""
    return {"shift": torch.tensor([float(p or 0) for p in prompts])}


class GaussianTeacher(Denoiser):
    """A Denoiser over `GaussianNetwork`, unconditional prompts "" (shift 0) or numbers: "1.5" shifts the mean by 1.5.

    Args:
        noise: any process.
        mean: a number or a tensor broadcastable to `shape`.
        std: the same, positive.
        shape: of one sample (C, ...); latents are 2 images - 1.
        knots: see GaussianNetwork; copies of the teacher's network are students.
        guided: see GaussianNetwork.
    """

    network_names = ("network",)
    takes_lora = False

    def __init__(
        self,
        noise: NoiseProcess,
        mean: float | Tensor = 0.0,
        std: float | Tensor = 1.0,
        shape: tuple[int, ...] = (1, 1, 1),
        knots: int = 4,
        guided: float | None = None,
    ):
        self._noise, self._shape = noise, shape
        self.mean, self.std = torch.as_tensor(mean).float(), torch.as_tensor(std).float()
        network = GaussianNetwork(noise, self.mean, self.std, knots, shape, guided)
        super().__init__(SimpleNamespace(network=network, components={"network": network}))

    @property
    def takes_guidance(self) -> bool:
        return self.network.guided is not None

    def with_guidance_input(self) -> GaussianTeacher:
        return GaussianTeacher(self._noise, self.mean, self.std, self._shape, len(self.network.scale) - 1, guided=0.0)

    def noise_process(self, latent_shape: tuple[int, ...] | None) -> NoiseProcess:
        return self._noise

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        return shifts(prompts)

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return network(x_t, time, condition.tensors["shift"].to(x_t), condition.guidance)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        return self._shape

    def to_latents(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def to_images(self, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5

    def draw(self, n: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
        """Data, (n, *shape)."""
        return self.mean + shift + self.std * torch.randn((n, *self._shape), generator=generator)

    def exact_x0(self, x_t: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        """E[x0 | x_t] at a shift of the mean; in float64 if x_t and t are."""
        return posterior(self.noise, x_t, t, self.mean.to(x_t) + shift, self.std.to(x_t))[0]

    def exact_ode(self, x_t: Tensor, t: Tensor, s: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        """Where the probability-flow ODE takes x_t: it keeps (x - alpha c) / sqrt(alpha^2 std^2 + sigma^2)."""
        mean, std = self.mean.to(x_t) + shift, self.std.to(x_t)
        alpha_t, sigma_t = self.noise.levels(t, x_t)
        alpha_s, sigma_s = self.noise.levels(s, x_t)
        ratio = (alpha_s**2 * std**2 + sigma_s**2) / (alpha_t**2 * std**2 + sigma_t**2)
        return alpha_s * mean + ratio.sqrt() * (x_t - alpha_t * mean)


def vp(prediction_type: str = "epsilon", zero_terminal_snr: bool = False) -> NoiseProcess:
    """Stable Diffusion's levels."""
    from fewstep.samplers.noise_config import from_config

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    return from_config({**betas, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_terminal_snr})


def processes() -> dict[str, NoiseProcess]:
    """One of each kind, all prediction types among them."""
    from fewstep.samplers.noise import EDM, Flow, TrigFlow

    return {
        "vp_epsilon": vp(),
        "vp_sample": vp("sample"),
        "vp_v": vp("v_prediction"),
        "vp_v_zero_snr": vp("v_prediction", zero_terminal_snr=True),
        "flow": Flow(),
        "flow_shifted": Flow(3.0),
        "edm": EDM(),
        "trig": TrigFlow(),
    }
