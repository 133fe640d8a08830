"""Frechet distance between two sets of feature vectors, and bootstrap standard errors.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the sets' means and covariances (arXiv:1706.08500), in float64.
At finite N it is biased upwards, by more the more dimensions there are: compare sets of one size, and take away the
distance of two real sets of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Number of vectors, mean (D,) and scatter (D, D), the sum of outer products about the mean, float64."""

    n: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D). Raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors; got {self.n}")
        return self.scatter / (self.n - 1)


def moments(features: Tensor) -> Moments:
    """Moments of features (N, D)."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be (N, D) with N at least 1; got {tuple(features.shape)}")
    features = features.double()
    mean = features.mean(0)
    return Moments(len(features), mean, (features - mean).T @ (features - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together (Chan et al. 1979), so that features can be seen in parts and forgotten."""
    n = a.n + b.n
    gap = b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(gap, gap) * (a.n * b.n / n)
    return Moments(n, a.mean + gap * (b.n / n), scatter)


def root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians with these moments.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: unlike
    the root of C1 C2 this exists for singular covariances, and no imaginary part has to be thrown away.
    """
    first = root(a.covariance)
    cross = torch.linalg.eigvalsh(first @ b.covariance @ first).clamp(min=0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of features (N, D) and (M, D)."""
    return frechet(moments(a), moments(b))


def stderr(statistic: Callable[..., float], *sizes: int, resamples: int = 50, seed: int = 0) -> float:
    """Bootstrap standard error: the standard deviation of a statistic over sets drawn with replacement.

    `statistic` takes one index tensor (n,) for each of the sizes n, that is for each set drawn independently.
    Near zero, where a distance is mostly bias, the error comes out about twice too large rather than too small.
    """
    generator = torch.Generator().manual_seed(seed)
    values = [statistic(*(torch.randint(n, (n,), generator=generator) for n in sizes)) for _ in range(resamples)]
    return torch.tensor(values, dtype=torch.float64).std().item()
