"""Maximum mean discrepancy between two sets of feature vectors: KID (polynomial kernel) and CMMD (Gaussian kernel)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]

GROUPS = 10
"""Interleaved groups that are left out one at a time for a standard error."""


def polynomial(x: Tensor, y: Tensor, degree: int = 3, gamma: float | None = None, offset: float = 1.0) -> Tensor:
    """(gamma <x, y> + offset)^degree, (N, M), of x (N, D) and y (M, D); gamma defaults to 1 / D, as KID's."""
    return ((x @ y.T) * (1 / x.shape[1] if gamma is None else gamma) + offset) ** degree


def gaussian(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), (N, M), of x (N, D) and y (M, D)."""
    square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return (square.clamp(min=0) / (-2 * sigma**2)).exp()


def subset_mmds(samples: Tensor, reference: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Tensor:
    """Unbiased squared MMD of random subsets in the polynomial kernel (KID, arXiv:1801.01401), (subsets,) float64.

    Subsets are drawn without replacement, and from the generator that torch-fidelity uses, so that the figures agree.

    Raises:
        ValueError: features that do not fit, or fewer of a set than a subset has.
    """
    check(samples, reference)
    if min(len(samples), len(reference)) < size or size < 2:
        raise ValueError(
            f"KID draws subsets of {size}: of {len(samples)} samples and {len(reference)} references a size of 2 to "
            f"{min(len(samples), len(reference))} can be drawn"
        )
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(generator.choice(len(features), size, replace=False))].double()
            for features in (samples, reference)
        )
        within = sum(k.sum() - k.trace() for k in (polynomial(x, x), polynomial(y, y))) / (size * (size - 1))
        values.append(within - 2 * polynomial(x, y).mean())
    return torch.stack([torch.as_tensor(value) for value in values])


def kid(
    samples: Tensor, reference: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean of `subset_mmds` over subsets, as torch-fidelity prints it, and its standard error. May be below 0.

    Subsets overlap: their standard deviation, which papers print, is divided by the root of the number of subsets that
    could be disjoint, and of no more than there are. Where two of a set cannot be, all are much the same images, and the
    error is that of leaving out one of ten groups of one set at a time: of sets from one distribution 1.4 times too large.
    """
    values = subset_mmds(samples, reference, subsets, size, seed)
    if min(len(samples), len(reference)) >= 2 * size and subsets > 1:
        return values.mean().item(), (values.std() / min(subsets, len(samples) // size) ** 0.5).item()
    x, y = (features[: GROUPS * size] for features in (samples, reference))
    return values.mean().item(), _grouped(x, y, polynomial, 2048, biased=False)[1]


def cmmd(
    samples: Tensor, reference: Tensor, sigma: float = 10.0, scale: float = 1000.0, tile: int = 2048
) -> tuple[float, float]:
    """Squared MMD of all pairs in a Gaussian kernel, times `scale` (CMMD, arXiv:2401.09603), and its standard error.

    The estimate with the diagonal, which is never below 0, as the authors'. Their features are unit vectors of CLIP
    ViT-L/14 at 336 pixels. Kernels of these lie within 2% of 1 and almost cancel, hence float64. Kernels are summed by
    tiles, and the error is that of leaving out one of ten groups of one set at a time.

    Args:
        samples: (N, D).
        reference: (M, D), given the same way.
        sigma: width of the kernel, in units of the features.
        scale: of the figure.
        tile: rows and columns of a kernel that are in memory.
    """
    check(samples, reference)
    value, error = _grouped(samples, reference, partial(gaussian, sigma=sigma), tile)
    return scale * value, scale * error


def _grouped(samples: Tensor, reference: Tensor, kernel: Kernel, tile: int, biased: bool = True) -> tuple[float, float]:
    """Squared MMD, with the diagonal or, unbiased, without, and the jackknife's error over groups of each set."""
    pairs = [(samples, samples), (reference, reference), (samples, reference)]
    xx, yy, xy = (_sums(a, b, kernel, tile) for a, b in pairs)
    n, m = (torch.tensor([len(f[g::GROUPS]) for g in range(GROUPS)]).double() for f in (samples, reference))
    # a vector with itself
    own = [torch.zeros(GROUPS).double() if biased else _diagonal(f, kernel) for f in (samples, reference)]

    def value(left: Tensor, right: Tensor) -> Tensor:
        """MMD of the groups of both sets whose weight is 1."""
        a, b = (left * n).sum(), (right * m).sum()
        within = [
            (w @ k @ w - w @ d) / (c * (c if biased else c - 1))
            for w, k, d, c in ((left, xx, own[0], a), (right, yy, own[1], b))
        ]
        return within[0] + within[1] - 2 * (left @ xy @ right) / (a * b)

    every = torch.ones(GROUPS).double()
    variance = 0.0
    for side, counts in enumerate((n, m)):
        filled = counts.nonzero().flatten()
        if len(filled) < (2 if biased else 3):  # unbiased, of two images at least
            return value(every, every).item(), float("nan")
        without = []
        for g in filled:
            weights = [every.clone(), every.clone()]
            weights[side][g] = 0
            without.append(value(*weights))
        left_out = torch.stack(without)
        variance += (len(filled) - 1) / len(filled) * (left_out - left_out.mean()).square().sum().item()
    return value(every, every).item(), variance**0.5


def _diagonal(x: Tensor, kernel: Kernel) -> Tensor:
    """Sums of the kernel of each vector of a group with itself, (GROUPS,) float64."""
    own = torch.cat([kernel(row[None], row[None])[0] for row in x.double()]).cpu()
    return torch.stack([own[g::GROUPS].sum() for g in range(GROUPS)])


def _sums(x: Tensor, y: Tensor, kernel: Kernel, tile: int) -> Tensor:
    """Sums of the kernel over each pair of groups, (GROUPS, GROUPS) float64."""
    sums = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
    for i in range(0, len(x), tile):
        for j in range(0, len(y), tile):
            k = kernel(x[i : i + tile].double(), y[j : j + tile].double())
            rows = torch.arange(i, i + k.shape[0]) % GROUPS
            columns = torch.arange(j, j + k.shape[1]) % GROUPS
            by_row = torch.zeros(GROUPS, k.shape[1], dtype=torch.float64).index_add_(0, rows, k.cpu())
            sums.index_add_(1, columns, by_row)
    return sums


def check(samples: Tensor, reference: Tensor) -> None:
    """Raise ValueError for sets that cannot be compared: of another space, not finite, or of fewer than two vectors."""
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must be features (N, D) of at least 2 images; got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name}: features are not finite")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"samples of {samples.shape[1]} and a reference of {reference.shape[1]} dimensions are of two feature spaces"
        )
