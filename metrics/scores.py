"""Figures that are means over images or prompts, from the single values.

A value has a key, the number of its image or prompt, and values are read in the order of their keys. So neither order
nor batches nor the number of processes change a figure, and what two processes both saw counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def mean_error(values: Tensor, groups: Sequence[int] | None = None) -> tuple[float, float]:
    """Mean of (N,) and its standard error; NaN for a single value.

    Args:
        values: of images, or of prompts.
        groups: of each value, its prompt: images of one prompt are alike, and the prompts are what was sampled. None, or
            all in one: the standard deviation over the root of N. With a value each the two are the same.
    """
    values, n = values.double(), len(values)
    mean = values.mean()
    parts, of = torch.as_tensor(groups if groups is not None else range(n)).unique(return_inverse=True)
    if len(parts) == 1:
        parts, of = torch.arange(n), torch.arange(n)
    sums = torch.zeros(len(parts), dtype=torch.float64).index_add(0, of, values - mean)
    g = len(parts)
    error = (sums.square().sum() * g / (g - 1)).sqrt().item() / n if n > 1 else float("nan")
    return mean.item(), error


class Scores:
    """Values by name and key. Small and picklable: processes send it whole, and one of them adds."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = defaultdict(dict)

    def update(self, keys: Sequence[int], **values: Tensor) -> None:
        """Take in a batch: for each name one value (N,) for each of the N keys.

        Raises:
            ValueError: counts differ, or a value is not a finite number.
        """
        for name, column in values.items():
            if column.shape != (len(keys),):
                raise ValueError(f"{name}: needs one value for each of {len(keys)} keys; got {tuple(column.shape)}")
            for key, value in zip(keys, column.double().tolist(), strict=True):
                if value - value != 0:
                    raise ValueError(f"{name}: the value of number {key} is {value}; its image or features are broken")
                self.values[name][key] = value

    def __add__(self, other: Scores) -> Scores:
        """Both together, as of two processes."""
        both = Scores()
        for part in (self, other):
            for name, column in part.values.items():
                both.values[name].update(column)
        return both

    def keys(self, name: str) -> list[int]:
        """Keys that have a value of this name, in order."""
        return sorted(self.values[name])

    def column(self, name: str) -> Tensor:
        """Values of a name in the order of their keys, (N,) float64."""
        return torch.tensor([self.values[name][key] for key in self.keys(name)], dtype=torch.float64)

    def figures(self) -> dict[str, tuple[float, float]]:
        """Mean and standard error of every name."""
        return {name: mean_error(self.column(name)) for name in self.values if self.values[name]}
