"""Feature spaces: any network that turns images into vectors, in which sets of images are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fewstep.metrics.images import Source, batches


class Features(Protocol):
    """A network: images (B, 3, H, W) uint8 to features (B, D) float32, each row of its own image alone.

    `name` says the network, its layer, the resize and the weights, for it keys caches and files of statistics: equal
    names mean equal features.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Tensor: ...


def each(features: Features, source: Source, batch: int = 64) -> Iterator[Tensor]:
    """Features of images in order, (B, D) float32 on the CPU.

    Raises:
        ValueError: features that are NaN or infinite, with the first such image.
    """
    seen = 0
    for images in batches(source, batch):
        found = features(images).detach().float().cpu()
        if found.shape[0] != len(images) or found.ndim != 2:
            raise ValueError(f"{features.name}: made {tuple(found.shape)} of {len(images)} images, and not (B, D)")
        broken = (~found.isfinite()).any(1).nonzero().flatten()
        if len(broken):
            raise ValueError(f"{features.name}: features of image {seen + int(broken[0])} are not finite")
        seen += len(images)
        yield found


def extract(features: Features, source: Source, batch: int = 64) -> Tensor:
    """All features, (N, D) float32, for figures that compare images with each other (KID, manifolds, MMD)."""
    return torch.cat(list(each(features, source, batch)))
