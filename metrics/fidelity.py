"""How near a student's image is to the teacher's many-step image of the same noise and prompt.

PSNR, SSIM, and with their networks LPIPS and the cosine of CLIP features: one value for each image, for `Scores`. They
say how much of the teacher's own map from noise to image was kept; a student that matches distributions alone may do
well in everything else and badly here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.metrics.networks import in_batches
from fewstep.metrics.pixels import image_psnr
from fewstep.samplers.compat import declare_torchvision_operators

Pairs = Callable[[Tensor, Tensor], Tensor]
"""Images (N, 3, H, W) uint8 and as many others to values (N,): an `Lpips`, `Clip.similarity`."""

BATCH = 16
"""Images that are compared at once: SSIM holds over ten copies of them in float32."""


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image to its own target, (N,) in -1..1, as torchmetrics computes it.

    Gaussian window of 11 pixels, sigma 1.5, mean over all places and channels (Wang et al. 2004).

    Args:
        images: (N, C, H, W) uint8, at least 6 pixels a side.
        target: same shape.
    """
    declare_torchvision_operators()
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        images.float() / 255, target.float() / 255, reduction="none", data_range=1.0
    )
    assert isinstance(values, Tensor)
    return values


def fidelity(
    images: Tensor, target: Tensor, lpips: Pairs | None = None, clip_similarity: Pairs | None = None
) -> dict[str, Tensor]:
    """Values (N,) of `psnr` in dB, `ssim`, and of `lpips` and `clip_similarity` where their networks are given.

    Args:
        images: (N, 3, H, W) uint8; of clips (N, F, 3, H, W) a value is the mean over frames.
        target: the teacher's, same shape, in the same order.
        lpips: an `Lpips`.
        clip_similarity: `Clip(...).similarity`.
    """
    if images.shape != target.shape or images.dtype != torch.uint8 or target.dtype != torch.uint8:
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (images, target))
        raise ValueError(f"fidelity compares uint8 images of one shape, each with its own target; got {got}")
    if images.ndim not in (4, 5) or not len(images):
        raise ValueError(f"images must be (N, 3, H, W) or (N, F, 3, H, W); got {tuple(images.shape)}")
    measures = {"psnr": image_psnr, "ssim": ssim, "lpips": lpips, "clip_similarity": clip_similarity}
    flat = [x.flatten(0, -4) for x in (images, target)]
    return {
        name: in_batches(pairs, BATCH, *flat).double().view(len(images), -1).mean(1)
        for name, pairs in measures.items()
        if pairs
    }
