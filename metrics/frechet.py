"""Frechet distance between two sets of feature vectors, its standard error, and its limit for infinitely many.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the sets' means and covariances (arXiv:1706.08500), in float64.
At finite N it is biased upwards, by more the more dimensions there are: compare sets of one size, take away the
distance of two real sets of that size, or extrapolate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FEWEST = 20
"""Images that an extrapolation needs."""


class Gaussian(Protocol):
    """What a distance needs: mean (D,) and covariance (D, D), float64."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


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


class Running:
    """Moments of features that arrive in parts, in groups: images g, g + groups, g + 2 groups, ... of the set.

    The groups give the standard error and the extrapolation without any feature being kept. Memory is
    8 groups D^2 bytes whatever N is (0.34 GB for 10 groups of 2048 features), and the bits do not depend on the parts.
    Small enough to be pickled; processes send it, and the sum of theirs is the state of one that saw every image.

    Args:
        features: name of the feature space; states of two spaces do not add.
        groups: 1 where only the distance is wanted.
    """

    BLOCK = 400
    """Rows of a group added at once: an update of every group for every batch would cost more than the network."""

    def __init__(self, features: str = "", groups: int = 10):
        self.features = features
        self.n = 0
        self._groups: list[Moments | None] = [None] * groups
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, keys: Sequence[int] | None = None) -> None:
        """Add features (B, D) of images that were not seen before.

        Args:
            features: of the next images.
            keys: their numbers in the set, which decide the groups; None: the next ones. Give them where processes
                share a set, and the standard error too is that of one process.

        Raises:
            ValueError: another D than before, features that are not finite, or another number of keys.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be (B, D); got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"features {self.features} of images {self.n} to {self.n + len(features)} are not finite")
        if self._width not in (None, features.shape[1]):
            raise ValueError(f"features of {features.shape[1]} dimensions after others of {self._width}")
        numbers = torch.arange(self.n, self.n + len(features)) if keys is None else torch.as_tensor(keys)
        if numbers.shape != features.shape[:1]:
            raise ValueError(f"needs one key for each of {len(features)} images; got {tuple(numbers.shape)}")
        self.n += len(features)
        # float64 sums on the CPU, which every machine has
        self._waiting.append((features.detach().cpu(), numbers % len(self._groups)))
        block = self.BLOCK * len(self._groups)
        if sum(len(rows) for rows, _ in self._waiting) < block:
            return
        rows, group = self._seen()
        full = len(rows) // block * block
        for start in range(0, full, block):
            self._groups = self._with(rows[start : start + block], group[start : start + block])
        self._waiting = [(rows[full:].clone(), group[full:].clone())]

    @property
    def _width(self) -> int | None:
        known = [rows for rows, _ in self._waiting] + [g.scatter for g in self._groups if g is not None]
        return known[0].shape[1] if known else None

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Rows that are not in the groups yet, and their groups."""
        rows, group = zip(*self._waiting, strict=True)
        return torch.cat(rows), torch.cat(group)

    def _with(self, rows: Tensor, group: Tensor) -> list[Moments | None]:
        return [_joined(known, rows[group == g]) for g, known in enumerate(self._groups)]

    def _all(self) -> list[Moments | None]:
        return self._with(*self._seen()) if self._waiting else self._groups

    def groups(self) -> list[Moments]:
        """Moments of each group that has images."""
        return [group for group in self._all() if group is not None]

    def moments(self) -> Moments:
        """Moments of all images. Raises ValueError where there are none."""
        groups = self.groups()
        if not groups:
            raise ValueError(f"no features {self.features} were seen")
        return reduce(merge, groups)

    def __add__(self, other: Running) -> Running:
        """Both together, as of two processes. Raises ValueError for other features or groups."""
        if (self.features, len(self._groups)) != (other.features, len(other._groups)):
            raise ValueError(
                f"states of {self.features} in {len(self._groups)} groups and of {other.features} in "
                f"{len(other._groups)} do not add"
            )
        both = Running(self.features, len(self._groups))
        both.n = self.n + other.n
        pairs = zip(self._all(), other._all(), strict=True)
        both._groups = [a if b is None else b if a is None else merge(a, b) for a, b in pairs]
        return both


def _joined(group: Moments | None, rows: Tensor) -> Moments | None:
    if not len(rows):
        return group
    return moments(rows) if group is None else merge(group, moments(rows))


def root(covariance: Tensor) -> Tensor:
    """F with F F^T a positive semidefinite matrix, (D, rank): eigenvalues that rounding may have made count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_to(a: Gaussian) -> Callable[[Gaussian], float]:
    """Squared Frechet distance to `a`, as a function, which factors the covariance of `a` once.

    With C1 = F F^T, tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of F^T C2 F, which is symmetric: unlike
    the root of C1 C2 this exists for singular covariances, and no imaginary part has to be thrown away.
    """
    mean, covariance = a.mean, a.covariance
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:  # singular: fewer vectors than dimensions
        factor = root(covariance)

    def distance(b: Gaussian) -> float:
        if b.mean.shape != mean.shape:
            raise ValueError(f"features of {len(mean)} and of {len(b.mean)} dimensions are of two feature spaces")
        other = b.covariance
        cross = torch.linalg.eigvalsh(factor.T @ other @ factor).clamp(min=0).sqrt().sum()
        return ((mean - b.mean).square().sum() + covariance.trace() + other.trace() - 2 * cross).item()

    return distance


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians."""
    return frechet_to(a)(b)


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


def frechet_figure(samples: Running, reference: Gaussian) -> tuple[float, float]:
    """Squared Frechet distance and its standard error, by leaving out one group of the samples at a time.

    The error is of the samples alone: the reference is taken as given; NaN for two samples. Warns where they are too few.
    """
    warn_if_few(samples.moments(), reference)
    at, everyone = _distances(samples, reference)
    left = samples.n - max(group.n for group in samples.groups())
    return at(everyone), _jackknife(at, everyone) if left > 1 else float("nan")


def frechet_infinity(samples: Running, reference: Gaussian) -> tuple[float, float]:
    """Distance of infinitely many samples (FID-infinity, arXiv:1911.07023), and its standard error.

    The bias falls as 1/N: the line in 1/N through the distance of all samples and the mean distance of their halves is
    read off at 0. The paper fits more and smaller sizes; below a few samples a dimension the bias is no line in 1/N, and
    disjoint halves count every image alike. The reference keeps the bias of its own size.

    Raises:
        ValueError: fewer than 4 groups of samples, or than 20 samples.
    """
    at, everyone = _distances(samples, reference)
    if len(everyone) < 4 or samples.n < FEWEST:
        raise ValueError(f"extrapolation needs 4 groups of 5 images or more; got {len(everyone)} of {samples.n} images")
    sizes = [group.n for group in samples.groups()]

    def intercept(kept: frozenset[int]) -> float:
        halves = [frozenset(i for i in kept if i % 2 == p) for p in (0, 1)]
        whole, half = 1 / sum(sizes[i] for i in kept), sum(1 / sum(sizes[i] for i in h) for h in halves) / 2
        slope = (sum(map(at, halves)) / 2 - at(kept)) / (half - whole)
        return at(kept) - slope * whole

    return intercept(everyone), _jackknife(intercept, everyone)


def _distances(samples: Running, reference: Gaussian) -> tuple[Callable[[frozenset[int]], float], frozenset[int]]:
    """Distance of some of the groups, each computed once, and all groups."""
    groups = samples.groups()
    space = getattr(reference, "features", "")
    if space and samples.features and space != samples.features:
        raise ValueError(f"samples seen by {samples.features} cannot be compared with a reference of {space}")
    distance = frechet_to(reference)

    @cache
    def at(some: frozenset[int]) -> float:
        return distance(reduce(merge, (groups[i] for i in sorted(some))))

    return at, frozenset(range(len(groups)))


def _jackknife(statistic: Callable[[frozenset[int]], float], everyone: Iterable[int]) -> float:
    """Standard error by leaving out one group at a time; NaN for a single group."""
    every = frozenset(everyone)
    n = len(every)
    if n < 2:
        return float("nan")
    without = torch.tensor([statistic(every - {g}) for g in sorted(every)], dtype=torch.float64)
    return ((n - 1) / n * (without - without.mean()).square().sum()).sqrt().item()


def warn_if_few(samples: Moments, reference: Gaussian) -> None:
    """Warn below five vectors a dimension (10,000 for Inception's 2048, the least that FID's authors advise)."""
    n, dimensions = samples.n, len(samples.mean)
    if n < 5 * dimensions:
        least = samples.covariance.trace().item() / n
        singular = "; fewer than dimensions, so the covariance is singular" if n <= dimensions else ""
        warnings.warn(
            f"Frechet distance of {n} samples in {dimensions} dimensions: biased upwards, by {least:.3g} for the mean "
            f"alone and by more for the covariance{singular}; compare it only with distances of {n} samples, take "
            f"{5 * dimensions} or more, or use frechet_infinity",
            stacklevel=3,
        )
