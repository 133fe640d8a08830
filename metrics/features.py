"""Feature spaces: any network that turns images into vectors, in which sets of images are compared.

Two states hold what was seen: `frechet.Running` sums for distances, and here `Kept` all features, for figures that compare
images with each other (KID, IS, CMMD, manifolds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fewstep.metrics.images import Source, batches

Read = Callable[[Source, int], Iterator[Tensor]]
"""A source and a number to batches of at most as many: `images.batches`, or of clips `clips.batches` and `clips.frames`."""


class Features(Protocol):
    """A network: images (B, 3, H, W) uint8 to features (B, D) float32, each row of its own image alone.

    `name` says the network, its layer, the resize and the weights, for it keys caches and files of statistics: equal
    names mean equal features.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Tensor: ...


def each(features: Features, source: Source, batch: int = 64, read: Read = batches) -> Iterator[Tensor]:
    """Features of images in order, (B, D) float32 on the CPU.

    Args:
        features: the network.
        source: images, or what else `read` reads.
        batch: images at once.
        read: source and batch to batches.

    Raises:
        ValueError: features that are NaN or infinite, with the first such image.
    """
    seen = 0
    for images in read(source, batch):
        found = features(images).detach().float().cpu()
        if found.shape[0] != len(images) or found.ndim != 2:
            raise ValueError(f"{features.name}: made {tuple(found.shape)} of {len(images)} images, and not (B, D)")
        broken = (~found.isfinite()).any(1).nonzero().flatten()
        if len(broken):
            raise ValueError(f"{features.name}: features of image {seen + int(broken[0])} are not finite")
        seen += len(images)
        yield found


def extract(features: Features, source: Source, batch: int = 64) -> Tensor:
    """All features, (N, D) float32, in order."""
    return torch.cat(list(each(features, source, batch)))


class Kept:
    """Features by the number of their image. Neither parts, order nor processes change what `tensor` gives.

    Args:
        features: name of the feature space; states of two spaces do not add.
    """

    def __init__(self, features: str = ""):
        self.features = features
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []

    def update(self, features: Tensor, keys: Sequence[int] | None = None) -> None:
        """Add features (B, D) of images with these numbers; None: the next ones."""
        first = sum(map(len, self._keys))
        numbers = torch.arange(first, first + len(features)) if keys is None else torch.as_tensor(keys)
        known = self._rows[0].shape[1:] if self._rows else features.shape[1:]
        if features.ndim != 2 or features.shape[1:] != known or numbers.shape != features.shape[:1]:
            raise ValueError(
                f"needs features (B, D) of one D and B keys; got {tuple(features.shape)} after (B, {known[-1]}) and "
                f"{len(numbers)} keys"
            )
        if len(broken := (~features.isfinite()).any(1).nonzero().flatten()):
            raise ValueError(f"features {self.features} of image {int(numbers[broken[0]])} are not finite")
        self._rows.append(features.detach().cpu())
        self._keys.append(numbers)

    def tensor(self) -> Tensor:
        """Features (N, D) in the order of their numbers; of an image seen twice, as where processes pad, the first."""
        if not self._rows:
            raise ValueError(f"no features {self.features} were seen")
        keys, order = torch.cat(self._keys).sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        return torch.cat(self._rows)[order[first]]

    def __add__(self, other: Kept) -> Kept:
        """Both together, as of two processes. Raises ValueError for other features."""
        if self.features != other.features:
            raise ValueError(f"features of {self.features} and of {other.features} do not add")
        both = Kept(self.features)
        both._rows, both._keys = self._rows + other._rows, self._keys + other._keys
        return both
