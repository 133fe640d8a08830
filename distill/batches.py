"""Which samples a micro-batch holds: a function of (seed, epoch, iteration, process), so that resume needs no state.

With several buckets a micro-batch is a group of one bucket (`buckets.Groups`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.distill.buckets import Groups
from fewstep.distill.cache import Latents, StoredConditions
from fewstep.distill.data import DataSet
from fewstep.distill.distiller import Batch, Pairs
from fewstep.distill.pairs import StoredPairs
from fewstep.distill.random import Rngs, permutation
from fewstep.samplers.condition import Condition


class Batches:
    """The micro-batches of one process.

    Args:
        data: the data set.
        shape: of one sample of latents, (C, ...).
        condition: conditions of `data.captions`, on the CPU, or None where the method encodes prompts itself.
        latents: latents of the images, (C, ...) each, on the CPU, or None.
        seed: the run's seed.
        batch_size: rows per micro-batch.
        accumulation: micro-batches per iteration.
        rank: this process, of `world`.
        world: see rank.
        device: where batches are returned.
        shapes: `shape` in each bucket, where there are several.
        pairs: of the teacher, drawn with the captions' `condition`, or None.
    """

    def __init__(
        self,
        data: DataSet,
        shape: tuple[int, ...],
        condition: Condition | StoredConditions | None,
        latents: Tensor | Latents | None,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        shapes: Sequence[tuple[int, ...]] = (),
        pairs: StoredPairs | None = None,
    ):
        self.data, self.shape, self.condition, self.latents, self.pairs = data, shape, condition, latents, pairs
        self.shapes = list(shapes)
        self.groups = Groups(data.bucket_of, batch_size, seed) if self.shapes else None
        self.seed, self.batch_size, self.accumulation = seed, batch_size, accumulation
        self.rank, self.world, self.device = rank, world, device
        self._epoch, self._order = -1, torch.empty(0)

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, len(self.data))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.data), self.seed, epoch)
        return int(self._order[place])

    def __call__(self, iteration: int, micro: int) -> tuple[Batch, Rngs]:
        """Micro-batch `micro` of an iteration, and its draws."""
        start = (micro * self.world + self.rank) * self.batch_size
        indices = range(start, start + self.batch_size)
        rng = Rngs(self.seed, iteration, indices, self.device)
        if self.groups is None:
            total = self.batch_size * self.accumulation * self.world
            samples = [self._sample(iteration * total + i) for i in indices]
        else:
            samples = self.groups((iteration * self.accumulation + micro) * self.world + self.rank)
        draws = Rngs(self.seed, iteration, indices).uniform("caption").tolist()
        captions = [self.data.caption(i, u) for i, u in zip(samples, draws, strict=True)]
        batch = Batch(
            prompts=[self.data.captions[c] for c in captions],
            shape=self.shapes[self.data.bucket_of[samples[0]]] if self.shapes else self.shape,
            condition=None if self.condition is None else self.condition[captions].to(self.device),
        )
        if self.latents is not None:
            batch.x0 = self.latents[samples].to(self.device)
        if self.latents is not None and self.data.has_images:
            batch.size_ids = torch.tensor([self.data.sizes(i) for i in samples], device=self.device)
        if self.pairs is not None and self.condition is not None:
            numbers = Rngs(self.seed, iteration, indices).integers("pair", 0, len(self.pairs)).tolist()
            rows = {k: v.to(self.device) for k, v in self.pairs[numbers].items()}
            told = self.condition[[self.pairs.captions[n] for n in numbers]].to(self.device)
            batch.pairs = Pairs(rows["z"], rows["x"], told, rows.get("between"))
        return batch, rng
