"""Regression of the student's one step to the teacher's many (DMD, arXiv:2311.18828, section 3.3), on pairs (z, x).

x is where the teacher's ODE takes the noise z: a function of z, so that the student which is nearest to all pairs, in
whatever distance, is that map.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.judges import refusals
from fewstep.distill.objectives.robust import pseudo_huber
from fewstep.distill.regression_config import RegressionConfig
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import NoiseProcess

Distance = Callable[[Tensor, Tensor], Tensor]
"""Samples and targets (B, ...), latents, to the mean of their distances, ()."""


def direction(x0: Tensor, target: Tensor, distance: Distance, rows: int = 1) -> tuple[Tensor, Tensor]:
    """N times the gradient of each row's distance, N its number of elements, (B, ...), and the mean distances of parts.

    Without graph, in full precision, so many rows at a time: of a decoder of images the graph of one row may be larger
    than that of the whole batch through the network.
    """
    gradients, values = [], []
    with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
        for part, to in zip(x0.detach().split(rows), target.split(rows), strict=True):
            part.requires_grad_()
            value = distance(part, to)
            gradients.append(torch.autograd.grad(value, part)[0] * part.numel())
            values.append(value.detach())
    return torch.cat(gradients), torch.stack(values)


def held_to(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess) -> Tensor:
    """The x0 with which one step of the `ode` rule goes from x_t to x_s, s < t; x_s itself at s = 0."""
    alpha_t, sigma_t = noise.levels(t, x_t)
    alpha_s, sigma_s = noise.levels(s, x_t)
    kept = sigma_s / sigma_t
    return (x_s - kept * x_t) / (alpha_s - kept * alpha_t)


def distance_of(config: RegressionConfig, huber_c: float, denoiser: Denoiser) -> Distance:
    """What `regression_metric` names: mean e^2 or sqrt(e^2 + c^2) - c over elements of latents, or a distance of images."""
    if config.regression_metric == "emoji_judge":
        from fewstep.metrics.emoji.judge import Perceptual

        return in_images(denoiser, Perceptual())
    if config.regression_metric == "lpips":
        return in_images(denoiser, lpips(config.lpips_net, config.lpips_weights))
    if config.regression_metric == "pseudo_huber":
        return partial(pseudo_huber, c=huber_c)
    return torch.nn.functional.mse_loss


def in_images(denoiser: Denoiser, perceptual: Any) -> Distance:
    """A distance of images, not clamped, as one of the latents that they are decoded from; of a clip its frames' mean.

    Args:
        denoiser: decodes; its autoencoder and `perceptual.network` come to where the latents are.
        perceptual: `between` images (N, 3, H, W) of 0..1, with their graph, to (N,).
    """

    def images(latents: Tensor) -> Tensor:
        made = denoiser.to_images(latents)
        return made.reshape(-1, *made.shape[-3:])

    def distance(x0: Tensor, target: Tensor) -> Tensor:
        for module in (getattr(denoiser.pipeline, "vae", None), perceptual.network):
            if module is not None and next(module.parameters()).device != x0.device:
                module.to(x0.device)
        with torch.no_grad():
            wanted = images(target)
        with refusals():
            return perceptual.between(images(x0), wanted).mean()

    return distance


@cache
def lpips(net: Any, weights: str | None) -> Any:
    """LPIPS, read once; UserError where its weights are missing, with the command or the key that supplies them."""
    from fewstep.metrics.lpips import Lpips

    with refusals("lpips_weights=FILE"):
        return Lpips(net, weights)
