"""What a denoiser is told beside x_t and t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    Attributes:
        tensors: what the network's forward takes, by the family's own names, each (B, ...); `size` counts the rows.
        negative: the same for the negative prompt, (B, ...) or (1, ...); empty where the family has none.
        guidance: guidance scale as a network input, (B,), for students and backbones that take it (1 = none).
        sizes: of the images, (B, 6), for SDXL: original height and width, top and left of the crop, height and width of the
            sample, in pixels; None: the sample's own size, uncropped. With the negative prompt they are the same.
        size: number of rows B.
    """

    tensors: dict[str, Tensor]
    size: int
    negative: dict[str, Tensor] = field(default_factory=dict)
    guidance: Tensor | None = None
    sizes: Tensor | None = None

    def _map(self, f: Callable[[Tensor], Tensor], size: int) -> Condition:
        negative = {k: v if len(v) == 1 and self.size != 1 else f(v) for k, v in self.negative.items()}
        guidance, sizes = (None if v is None else f(v) for v in (self.guidance, self.sizes))
        return Condition({k: f(v) for k, v in self.tensors.items()}, size, negative, guidance, sizes)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Condition:
        """Some rows; a shared negative (1, ...) stays."""
        if isinstance(rows, slice):
            return self._map(lambda v: v[rows], len(range(self.size)[rows]))
        index = torch.as_tensor(rows)
        return self._map(lambda v: v[index.to(v.device)], len(index))

    def to(self, device: torch.device | str) -> Condition:
        """The same on a device."""
        move = {k: v.to(device) for k, v in self.negative.items()}
        return replace(self._map(lambda v: v.to(device), self.size), negative=move)

    def with_guidance(self, scale: Tensor | float | None) -> Condition:
        """The same with a guidance scale as network input, one for all rows or (B,)."""
        if scale is None:
            return replace(self, guidance=None)
        return replace(self, guidance=torch.as_tensor(scale, dtype=torch.float32).expand(self.size))

    def unconditional(self) -> Condition:
        """The negative prompt in every row; the condition itself where the family has none."""
        if not self.negative:
            return self
        rows = {k: v.expand(self.size, *v.shape[1:]) for k, v in self.negative.items()}
        return replace(self, tensors=rows)


def concatenate(parts: Sequence[Condition]) -> Condition:
    """Rows of several conditions, in order; what only the negatives of some share is repeated for each row."""
    size = sum(p.size for p in parts)
    tensors = {k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors}
    negative = {
        k: torch.cat([p.negative[k].expand(p.size, *p.negative[k].shape[1:]) for p in parts]) for k in parts[0].negative
    }
    guidance = None if parts[0].guidance is None else torch.cat([p.guidance for p in parts if p.guidance is not None])
    sizes = None if parts[0].sizes is None else torch.cat([p.sizes for p in parts if p.sizes is not None])
    return Condition(tensors, size, negative, guidance, sizes)


def dropped(condition: Condition, keep: Tensor) -> Condition:
    """The negative prompt in the rows where `keep`, (B,) bool, is False."""
    empty = condition.unconditional().tensors
    rows = {k: torch.where(keep.reshape(-1, *[1] * (v.ndim - 1)), v, empty[k]) for k, v in condition.tensors.items()}
    return replace(condition, tensors=rows)
