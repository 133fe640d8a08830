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

Distance = Callable[[Tensor, Tensor], Tensor]
"""Samples and targets (B, ...), latents, to the mean of their distances, ()."""


def direction(x0: Tensor, target: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """N times the gradient of each row's distance, N its number of elements, (B, ...), and the distances (B,).

    Without graph, in full precision, a row at a time: of a decoder of images the graph of one row may be larger than
    that of the whole batch through the network.
    """
    gradients, values = [], []
    with torch.enable_grad(), torch.autocast(x0.device.type, enabled=False):
        for row, to in zip(x0.detach().split(1), target.split(1), strict=True):
            row.requires_grad_()
            value = distance(row, to)
            gradients.append(torch.autograd.grad(value, row)[0] * row.numel())
            values.append(value.detach())
    return torch.cat(gradients), torch.stack(values)


def distance_of(config: RegressionConfig, huber_c: float, denoiser: Denoiser) -> Distance:
    """What `regression_metric` names: mean e^2 or sqrt(e^2 + c^2) - c over elements of latents, or LPIPS of images."""
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
