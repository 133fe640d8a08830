"""Which samples a micro-batch holds: a function of (seed, epoch, iteration, process), so that resume needs no state."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.distill.data import DataSet
from fewstep.distill.distiller import Batch
from fewstep.distill.random import Rngs, permutation
from fewstep.samplers.condition import Condition


class Batches:
    """The micro-batches of one process.

    Args:
        data: the data set.
        shape: of one sample of latents, (C, ...).
        condition: conditions of `data.captions`, on the CPU, or None where the method encodes prompts itself.
        latents: latents of the images, (N, C, ...), on the CPU, or None.
        seed: the run's seed.
        batch_size: rows per micro-batch.
        accumulation: micro-batches per iteration.
        rank: this process, of `world`.
        world: see rank.
        device: where batches are returned.
    """

    def __init__(
        self,
        data: DataSet,
        shape: tuple[int, ...],
        condition: Condition | None,
        latents: Tensor | None,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.data, self.shape, self.condition, self.latents = data, shape, condition, latents
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
        total = self.batch_size * self.accumulation * self.world
        samples = [self._sample(iteration * total + i) for i in indices]
        draws = Rngs(self.seed, iteration, indices).uniform("caption").tolist()
        captions = [self.data.caption(i, u) for i, u in zip(samples, draws, strict=True)]
        return Batch(
            prompts=[self.data.captions[c] for c in captions],
            shape=self.shape,
            condition=None if self.condition is None else self.condition[captions].to(self.device),
            x0=None if self.latents is None else self.latents[samples].to(self.device),
        ), rng
