"""Randomness is counted, not carried: a draw is a function of (seed, stream, iteration, global index of the sample).

No generator state exists between draws, so resume is exact by construction, and neither the number of processes nor
the size of a micro-batch changes what a sample sees. All draws are made on the CPU, the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on the key alone."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Order of a data set of n samples in one epoch."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


class Rngs:
    """The draws of one micro-batch.

    Args:
        seed: the run's seed.
        iteration: optimiser iteration.
        indices: global index of each row within the iteration, over processes and micro-batches.
        device: where the draws are returned.
    """

    def __init__(self, seed: int, iteration: int, indices: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.iteration = iteration
        self.indices = list(indices)
        self.device = device

    def _rows(self, stream: str) -> list[torch.Generator]:
        return [generator(self.seed, stream, self.iteration, i) for i in self.indices]

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape)."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._rows(stream)]).to(self.device)

    def uniform(self, stream: str) -> Tensor:
        """Uniform in [0, 1), (B,), float32."""
        return torch.cat([torch.rand(1, generator=g) for g in self._rows(stream)]).to(self.device)

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        """Uniform integers in low..high - 1, (B,)."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._rows(stream)]).to(self.device)

    def shared(self, stream: str) -> torch.Generator:
        """A generator that is the same for all samples of the iteration, on all processes."""
        return generator(self.seed, stream, self.iteration, "shared")
