"""Sizes for images of several shapes, and batches that hold one size each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fewstep.distill.random import generator, permutation


def make_buckets(
    height: int, width: int, step: int = 64, shortest: int | None = None, longest: int | None = None
) -> list[tuple[int, int]]:
    """Sizes (height, width) with at most the area of the given one, sides multiples of `step`, flat to tall.

    For every width the greatest height that keeps the area, and the same turned by a quarter, as kohya's scripts do.

    Args:
        height: of the usual size, itself a bucket.
        width: see height.
        step: sides are multiples of it.
        shortest: least side; default: half the square root of the area.
        longest: greatest side; default: twice the square root of the area.
    """
    root = math.isqrt(height * width)
    shortest, longest = shortest or root // 2, longest or 2 * root
    found = {(height, width)}
    for w in range(-(-shortest // step) * step, longest + 1, step):
        h = min(height * width // w, longest) // step * step
        if h >= shortest:
            found |= {(h, w), (w, h)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def nearest(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Index of the size whose shape is nearest, by the ratio of the aspect ratios: the least is cut away."""
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][0] * width / (sizes[i][1] * height))))


class Groups:
    """The order of an epoch in groups of one bucket each: a function of (seed, epoch), as that of single samples.

    A bucket's samples are shuffled and cut into groups; the last one of a bucket is filled up with samples from its
    beginning, so that every sample is in an epoch once at least. The groups of all buckets are shuffled then.

    Args:
        bucket_of: bucket of each sample.
        size: samples of a group.
        seed: the run's seed.
    """

    def __init__(self, bucket_of: Sequence[int], size: int, seed: int):
        bucket = np.asarray(bucket_of)
        self.members = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
        self.size, self.seed = size, seed
        self.count = sum(-(-len(m) // size) for m in self.members)
        self._epoch, self._groups = -1, np.empty(0)

    def __call__(self, index: int) -> list[int]:
        """Samples of the group at a position, counted over all epochs."""
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            self._epoch, self._groups = epoch, self._order(epoch)
        return self._groups[place].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        groups = []
        for members in self.members:
            source = generator(self.seed, "bucket", epoch, int(members[0]))
            order = members[torch.randperm(len(members), generator=source).numpy()]
            groups.append(np.resize(order, (-(-len(order) // self.size), self.size)))  # repeats to fill up
        whole = np.concatenate(groups)
        return whole[permutation(len(whole), self.seed, epoch).numpy()]
