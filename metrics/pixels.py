"""Figures that need no judge: peak signal-to-noise ratio and pairwise distance of pixels, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.metrics.scores import mean_error


def image_psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image to its own target, dB, (N,) float64.

    Args:
        images: (N, ...) uint8.
        target: same shape; an image equal to its target counts as one grey level off in one value.
    """
    n = images[0].numel()
    error = torch.stack([_squares(*pair) for pair in zip(images, target, strict=True)]) / n
    return 10 * (255**2 / error.clamp(min=1 / n)).log10()


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the squares of a difference, float64; of a clip some frames at a time."""
    parts = zip(a.flatten().split(2**24), b.flatten().split(2**24), strict=True)
    return torch.stack([(x.double() - y.double()).square().sum() for x, y in parts]).sum()


def psnr(images: Tensor, target: Tensor, groups: Sequence[int] | None = None) -> tuple[float, float]:
    """Mean of `image_psnr`, dB, and its standard error, see `mean_error`."""
    return mean_error(image_psnr(images, target), groups)


def mean_distance(images: Tensor, groups: Sequence[int]) -> tuple[float, float]:
    """Root mean square difference of the pixels of two images of one group, 0..255: mean over pairs, then groups.

    Args:
        images: (N, ...) uint8.
        groups: group of each image; groups of one image are left out.

    Returns:
        The mean and its standard error over groups; of a single group by the jackknife over its images.
    """
    members = torch.as_tensor(groups)
    flat = images.flatten(1)
    means, last = [], torch.empty(0)
    for group in members.unique():
        rows = flat[members == group].float()
        n = len(rows)
        if n < 2:
            continue
        last = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").double() / rows.shape[1] ** 0.5
        means.append(last.sum() / (n * (n - 1)))
    if not means:
        return float("nan"), float("nan")
    value = torch.stack(means).mean()
    if len(means) > 1:
        return value.item(), (torch.stack(means).std() / len(means) ** 0.5).item()
    n = len(last)
    if n < 3:
        return value.item(), float("nan")
    without = (last.sum() - 2 * last.sum(1)) / ((n - 1) * (n - 2))
    return value.item(), ((n - 1) / n * (without - without.mean()).square().sum()).sqrt().item()
