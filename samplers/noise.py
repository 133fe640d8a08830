r"""Noise processes: :math:`x_t = \alpha(t) x_0 + \sigma(t) \epsilon`, and every conversion between predictions.

One public time for the whole project: a float `t` in [0, 1], 0 = clean, 1 = the last training level, never rounded,
shape () or (B,) or (B, frames). Levels and conversions are float32 (float64 if `t` is) and differentiable in `t`.
At t = 1 alpha need not be 0 (Stable Diffusion: 0.068).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fewstep.samplers.errors import UserError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def expand(t: Tensor, x: Tensor) -> Tensor:
    """`t` of shape (), (B,) or (B, frames) so that it broadcasts over `x`, (B, C, ...) or (B, C, frames, ...)."""
    if t.ndim <= 1:
        return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
    return t.reshape(t.shape[0], 1, t.shape[1], *[1] * (x.ndim - 3))


class NoiseProcess(ABC):
    """The levels of a diffusion or flow model, and what its network predicts.

    Args:
        prediction_type: one of `PREDICTION_TYPES`; v is `alpha eps - sigma x0`, flow is `eps - x0`.
        clip_range: where a scheduler clips its samples (`clip_sample`), the bound on x0 while sampling.
    """

    def __init__(self, prediction_type: str, clip_range: float | None = None):
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(f"prediction_type {prediction_type!r} is unknown; allowed: {', '.join(PREDICTION_TYPES)}")
        self.prediction_type = prediction_type
        self.clip_range = clip_range

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the signal, shape of `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise, shape of `t`."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The time that the network is told, shape of `t`."""

    @abstractmethod
    def from_model_time(self, time: Tensor) -> Tensor:
        """The inverse of `model_time`, in float64."""

    def shift(self, u: Tensor) -> Tensor:
        """The time `t` of the uniform draw or grid point `u` in [0, 1]; the identity except for shifted flows."""
        return u

    def unshift(self, t: Tensor) -> Tensor:
        """The inverse of `shift`."""
        return t

    def levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at `t`, broadcastable over `x`."""
        t = t if t.dtype == torch.float64 else t.float()
        t = t.to(x.device)
        alpha, sigma = self._both(t)
        return expand(alpha, x), expand(sigma, x)

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha(t), self.sigma(t)

    def add(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from clean data and noise."""
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * eps

    def kernel(self, s: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the forward kernel from level s up to t, broadcastable over `x`; see `renoise`."""
        alpha_s, sigma_s = self.levels(s, x)
        alpha_t, sigma_t = self.levels(t, x)
        a = alpha_t / alpha_s
        return a, (sigma_t.square() - (a * sigma_s).square()).clamp(min=0).sqrt()

    def renoise(self, x_s: Tensor, xi: Tensor, s: Tensor, t: Tensor) -> Tensor:
        r"""x_t from x_s at a lower level s < t by the forward kernel: :math:`a x_s + b \xi`.

        a = alpha_t / alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2; maps marginals of the process onto each other.
        """
        a, b = self.kernel(s, t, x_s)
        return a * x_s + b * xi

    def _pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(a, b) with output = a x0 + b eps."""
        return {
            "epsilon": (0.0, 1.0),
            "sample": (1.0, 0.0),
            "v_prediction": (-sigma, alpha),
            "flow_prediction": (-1.0, 1.0),
        }[self.prediction_type]

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Clean data from a network output at x_t: the solution of x = alpha x0 + sigma eps, o = a x0 + b eps."""
        alpha, sigma = self.levels(t, x_t)
        a, b = self._pair(alpha, sigma)
        return (b * x_t - sigma * output) / (alpha * b - sigma * a)

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Noise from a network output; not from x0, which would divide a difference by a small sigma near t = 0."""
        alpha, sigma = self.levels(t, x_t)
        a, b = self._pair(alpha, sigma)
        return (alpha * output - a * x_t) / (alpha * b - sigma * a)

    def output(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network would have to say: the training target for clean data and noise."""
        a, b = self._pair(*self.levels(t, x0))
        return a * x0 + b * eps

    def eps_of_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Noise from a prediction of clean data, t > 0."""
        alpha, sigma = self.levels(t, x_t)
        return (x_t - alpha * x0) / sigma

    def score(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of log density at x_t from the denoiser's x0 (Tweedie): -(x_t - alpha x0) / sigma^2."""
        return -self.eps_of_x0(x0, x_t, t) / self.levels(t, x_t)[1]

    def velocity(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' x0 + sigma' eps; the derivatives by autograd."""
        time = t.detach().reshape(-1).requires_grad_()
        with torch.enable_grad():
            alpha, sigma = self.alpha(time), self.sigma(time)
            (d_alpha,) = torch.autograd.grad(alpha.sum(), time, retain_graph=True)
            (d_sigma,) = torch.autograd.grad(sigma.sum(), time)
        shape = t.shape
        eps = self.eps_of_x0(x0, x_t, t)
        return expand(d_alpha.reshape(shape), x_t) * x0 + expand(d_sigma.reshape(shape), x_t) * eps


class Discrete(NoiseProcess):
    """Variance preserving, from a table of N levels (DDPM, Stable Diffusion).

    Index n sits at t = (n + 1) / N, clean data at 0. Between two entries sigma / alpha is linear, as in
    EulerDiscreteScheduler; before a last entry of zero terminal SNR, where that is infinite, alpha / sigma is.

    Args:
        alphas_cumprod: squares of alpha, (N,), decreasing.
        prediction_type: as in NoiseProcess.
        clip_range: as in NoiseProcess.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, clip_range: float | None = None):
        super().__init__(prediction_type, clip_range)
        table = alphas_cumprod.double()
        self.n = len(table)
        if table[-1] == 0 and prediction_type == "epsilon":
            raise UserError("prediction_type epsilon says nothing at zero terminal SNR; use v_prediction or sample")
        ratio = torch.cat([torch.zeros(1).double(), ((1 - table) / table).sqrt()])
        self._ratios = {(ratio.device, ratio.dtype): ratio}  # sigma / alpha at i / N, where it was asked for

    def _table(self, t: Tensor) -> Tensor:
        place = (t.device, t.dtype)
        if place not in self._ratios:
            self._ratios[place] = next(iter(self._ratios.values())).to(t)
        return self._ratios[place]

    def _both(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self._table(t)
        position = t * self.n
        low = position.detach().floor().clamp(0, self.n - 1).long()
        weight = position - low
        left, right = ratio[low], ratio[low + 1]
        linear = left + weight * (torch.where(right.isinf(), left, right) - left)
        inverse = (1 - weight) / left.clamp(min=torch.finfo(t.dtype).tiny)  # alpha / sigma, falling to 0
        last = right.isinf()
        rho = torch.where(last, inverse, linear)
        small, large = rho / (1 + rho.square()).sqrt(), 1 / (1 + rho.square()).sqrt()
        return torch.where(last, small, large), torch.where(last, large, small)

    def alpha(self, t: Tensor) -> Tensor:
        return self._both(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._both(t)[1]

    def model_time(self, t: Tensor) -> Tensor:
        """Index on the training grid, fractional; 0 below the first entry."""
        return (t * self.n - 1).clamp(min=0)

    def from_model_time(self, time: Tensor) -> Tensor:
        return (time.double() + 1) / self.n


class Flow(NoiseProcess):
    """Flow matching: x_t = (1 - t) x0 + t eps; `t` is sigma after the shift.

    Args:
        factor: `shift(u) = f u / (1 + (f - 1) u)`; a dynamic shift is the same with f = exp(mu).
        time_scale: what the network is told at t = 1 (`num_train_timesteps`).
    """

    def __init__(self, factor: float = 1.0, time_scale: float = 1000.0):
        super().__init__("flow_prediction")
        self.factor = factor
        self.time_scale = time_scale

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def shift(self, u: Tensor) -> Tensor:
        return self.factor * u / (1 + (self.factor - 1) * u)

    def unshift(self, t: Tensor) -> Tensor:
        return t / (self.factor - (self.factor - 1) * t)

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.time_scale

    def from_model_time(self, time: Tensor) -> Tensor:
        return time.double() / self.time_scale


class EDM(NoiseProcess):
    """Variance exploding: x_t = x0 + sigma eps, sigma = sigma_max t^rho, so that t = 0 is clean (Karras et al., 2022).

    The network is told ln(sigma) / 4.
    """

    def __init__(self, prediction_type: str = "sample", sigma_max: float = 80.0, rho: float = 7.0):
        super().__init__(prediction_type)
        self.sigma_max = sigma_max
        self.rho = rho

    def alpha(self, t: Tensor) -> Tensor:
        return 1 + 0 * t  # a constant with a derivative

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t**self.rho

    def model_time(self, t: Tensor) -> Tensor:
        return self.sigma(t).log() / 4

    def from_model_time(self, time: Tensor) -> Tensor:
        return ((4 * time.double()).exp() / self.sigma_max) ** (1 / self.rho)


class TrigFlow(NoiseProcess):
    """x_t = cos(a) x0 + sin(a) eps with the angle a = t pi / 2 (sCM, arXiv:2410.11081); the network is told a.

    Data and noise both have the data's standard deviation; scale the latents to unit variance before.
    """

    def __init__(self, prediction_type: str = "v_prediction"):
        super().__init__(prediction_type)

    def alpha(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def model_time(self, t: Tensor) -> Tensor:
        return t * (math.pi / 2)

    def from_model_time(self, time: Tensor) -> Tensor:
        return time.double() * (2 / math.pi)
