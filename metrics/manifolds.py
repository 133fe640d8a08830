"""Fidelity and variety apart: precision and recall, density and coverage, by balls around nearest neighbours.

The manifold of a set is the union of balls around its vectors, each reaching to the k-th nearest other vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.metrics.mmd import check

TILE = 2048
"""Rows and columns of the distances in memory: 0.2 GB at 2048 features beside the features themselves."""


def manifolds(samples: Tensor, reference: Tensor, k: int = 3, k_density: int = 5) -> dict[str, tuple[float, float]]:
    """Four figures of samples (N, D) and a reference (M, D), name -> (value, standard error).

    precision: share of the samples in the manifold of the reference (arXiv:1904.06991, k = 3).
    recall: share of the reference in the manifold of the samples.
    density: mean number of reference balls around a sample, over k_density (arXiv:2002.09797, k = 5); may exceed 1.
    coverage: share of the reference whose ball holds a sample.

    Balls are closed. All fall with the number of vectors, and are compared at one N and M (50,000 in the first paper,
    10,000 in the second). The errors take the manifolds as given. Memory is that of the features and of a few tiles;
    distances are computed in the features' own precision.

    Raises:
        ValueError: features that do not fit, or no more than k vectors.
    """
    check(samples, reference)
    most = max(k, k_density)
    if min(len(samples), len(reference)) <= most or min(k, k_density) < 1:
        raise ValueError(f"{most} neighbours need {most + 1} vectors; got {len(samples)} and {len(reference)}")
    center = reference.mean(0)  # |x|^2 + |y|^2 - 2 xy cancels least about it
    near = radii(samples, k, center)[:, -1]
    balls = radii(reference, most, center)
    tight, wide = balls[:, k - 1], balls[:, k_density - 1]

    precise = torch.zeros(len(samples), dtype=torch.bool)
    around = torch.zeros(len(samples), dtype=torch.int64)
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    for rows, columns, square in _tiles(samples, reference, center):
        square = square.cpu()
        precise[rows] |= (square <= tight[columns]).any(1)
        recalled[columns] |= (square <= near[rows, None]).any(0)
        inside = square <= wide[columns]
        around[rows] += inside.sum(1)
        covered[columns] |= inside.any(0)
    found = {"precision": precise, "recall": recalled, "density": around.double() / k_density, "coverage": covered}
    return {name: _mean(values) for name, values in found.items()}


def radii(features: Tensor, k: int, center: Tensor | None = None) -> Tensor:
    """Squared distances of each of (N, D) to its k nearest others, ascending, (N, k) on the CPU."""
    center = features.mean(0) if center is None else center
    best = torch.full((len(features), k), float("inf"), dtype=features.dtype)
    for rows, columns, square in _tiles(features, features, center):
        if rows == columns:
            square.fill_diagonal_(float("inf"))
        some = square.topk(min(k, square.shape[1]), largest=False).values.cpu()
        best[rows] = torch.cat([best[rows], some], 1).topk(k, largest=False).values
    return best


def _tiles(x: Tensor, y: Tensor, center: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and squared distances of a tile at a time; only the tile's vectors are copied."""
    for i in range(0, len(x), TILE):
        a = x[i : i + TILE] - center
        for j in range(0, len(y), TILE):
            b = y[j : j + TILE] - center
            square = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True))
            yield slice(i, i + len(a)), slice(j, j + len(b)), square


def _mean(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
