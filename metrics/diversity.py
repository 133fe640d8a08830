"""Diversity of the samples of one prompt, and its ratio to the teacher's.

A student may keep FID and lose the variety of a single prompt; so everything here is taken prompt by prompt, and a
value belongs to a prompt. A prompt's samples are needed together: batches are made of whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics.frechet import stderr

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distances of pairs, (n, ...) and (n, ...) to (n,): `euclidean`, `cosine_distance`, or an `Lpips` for images."""

PAIRS = 64
"""Pairs whose two members are in memory at once."""


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Length of the difference of features (n, D), (n,) float64."""
    return (a.double() - b.double()).norm(dim=-1)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of features (n, D), (n,) float64 in 0..2."""
    return 1 - F.cosine_similarity(a.double(), b.double(), dim=-1)


def mean_pairwise(samples: Tensor, distance: Distance = euclidean) -> float:
    """Mean distance of two different samples, over all pairs.

    Args:
        samples: (n, ...), features (n, D), or images (n, 3, H, W) uint8 for an `Lpips`; n at least 2.
        distance: of pairs.
    """
    first, second = torch.triu_indices(len(samples), len(samples), 1)
    if not len(first):
        raise ValueError("a mean distance of pairs needs at least 2 samples")
    parts = zip(first.split(PAIRS), second.split(PAIRS), strict=True)
    return torch.cat([distance(samples[i], samples[j]) for i, j in parts]).double().mean().item()


def vendi(features: Tensor) -> float:
    """Vendi score (arXiv:2210.02410): how many different samples there are, 1..n.

    The exponential of the entropy of the eigenvalues of K / n, K the cosines of features (n, D). Where n > D the same
    eigenvalues are those of the smaller X^T X / n.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (n, D) with n at least 1; got {tuple(features.shape)}")
    x = F.normalize(features.double(), dim=-1)
    kernel = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(kernel / len(x)).clamp(min=0)
    return torch.special.entr(values).sum().exp().item()


def by_prompt(
    samples: Tensor, prompts: Sequence[int], figure: Callable[[Tensor], float] = mean_pairwise
) -> tuple[list[int], Tensor]:
    """A figure of every prompt with two samples or more, as `Scores.update` takes them.

    Args:
        samples: (N, ...).
        prompts: number of each sample's prompt.
        figure: of the samples of one prompt, e.g. `vendi` or `partial(mean_pairwise, distance=lpips)`.

    Returns:
        Numbers of the prompts, ascending, and their values (P,) float64.
    """
    if len(samples) != len(prompts):
        raise ValueError(f"needs one prompt for each sample; got {len(samples)} samples and {len(prompts)} prompts")
    members = torch.as_tensor(prompts)
    numbers, counts = members.unique(return_counts=True)
    kept = numbers[counts > 1]
    values = [figure(samples[members == number]) for number in kept]
    return kept.tolist(), torch.tensor(values, dtype=torch.float64)


def ratio(values: Tensor, teacher: Tensor, resamples: int = 400) -> tuple[float, float]:
    """Mean of (P,) over the teacher's mean for the same prompts, and its bootstrap standard error over prompts.

    Both are resampled together: what a prompt allows moves the two alike.
    """
    if values.shape != teacher.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"needs the same prompts of both; got {tuple(values.shape)} and {tuple(teacher.shape)} values")
    values, teacher = values.double(), teacher.double()
    if teacher.mean() <= 0:
        raise ValueError("the teacher's samples of every prompt are all alike: there is no diversity to compare with")

    def of(i: Tensor) -> float:
        return (values[i].mean() / teacher[i].mean()).item()

    return of(torch.arange(len(values))), stderr(of, len(values), resamples=resamples)
