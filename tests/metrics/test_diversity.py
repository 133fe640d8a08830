"""Diversity of samples: closed forms, brute force, and what a collapse does."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from fewstep.metrics.diversity import by_prompt, cosine_distance, euclidean, mean_pairwise, ratio, vendi
from fewstep.metrics.scores import Scores


def gaussian(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_vendi_counts_what_is_different():
    """Alike 1, orthogonal n, k groups of m alike k; length does not matter. n is below, at and above D."""
    assert vendi(gaussian(1, 6).expand(5, 6)) == pytest.approx(1)
    assert vendi(torch.eye(6) * torch.arange(1, 7)) == pytest.approx(6)
    assert vendi(torch.eye(6)[:4]) == pytest.approx(4)
    assert vendi(torch.eye(6)[:3].repeat(7, 1)) == pytest.approx(3)


def test_vendi_of_two_vectors_and_of_uneven_groups():
    """Two at cosine c: eigenvalues (1 + c) / 2 and (1 - c) / 2; copies 3 and 1: 3/4 and 1/4."""

    def of(*shares: float) -> float:
        return math.exp(-sum(p * math.log(p) for p in shares))

    c = math.cos(0.7)
    pair = torch.tensor([[1, 0], [c, math.sin(0.7)]], dtype=torch.float64)
    assert vendi(pair) == pytest.approx(of((1 + c) / 2, (1 - c) / 2), rel=1e-12)
    assert vendi(torch.eye(2)[[0, 0, 0, 1]]) == pytest.approx(of(0.75, 0.25))


def test_vendi_is_the_entropy_of_the_kernel_on_both_sides():
    """Of the n x n kernel, for more samples than dimensions and for fewer."""
    for n, d in ((20, 7), (7, 20)):
        x = torch.nn.functional.normalize(gaussian(n, d).double(), dim=-1)
        values = torch.linalg.eigvals(x @ x.T / n).real.clamp(min=1e-300)
        assert vendi(3 * x) == pytest.approx((-(values * values.log()).sum()).exp().item(), rel=1e-9)


@pytest.mark.parametrize("distance", [euclidean, cosine_distance])
def test_mean_over_pairs_by_brute_force(distance):
    """More pairs than are in memory at once."""
    x = gaussian(15, 5).double()
    own = {euclidean: math.dist, cosine_distance: lambda a, b: 1 - a @ b / math.hypot(*a) / math.hypot(*b)}[distance]
    expected = sum(own(a, b) for a, b in itertools.combinations(x, 2)) / 105
    assert mean_pairwise(x, distance) == pytest.approx(float(expected), rel=1e-9)


def test_any_distance_of_images():
    """Images of levels 0, 3, 9: (3 + 6 + 9) / 3."""
    images = torch.tensor([0, 3, 9], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)

    def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() - b.float()).abs().mean((1, 2, 3))

    assert mean_pairwise(images, levels) == 6


def test_prompts_apart_in_any_split():
    """Samples of prompts 3, 1, 8 mixed; prompt 5 has one sample. Whole prompts in one batch or in two: the same."""
    x, prompts = gaussian(9, 4), [3, 1, 8, 3, 1, 5, 8, 8, 3]
    numbers, values = by_prompt(x, prompts)
    assert numbers == [1, 3, 8]
    for number, value in zip(numbers, values.tolist(), strict=True):
        assert value == mean_pairwise(x[[i for i, p in enumerate(prompts) if p == number]])
    whole, parts = Scores(), Scores()
    whole.update(numbers, diversity=values)
    for some in ((8,), (1, 3, 5)):
        rows = [i for i, p in enumerate(prompts) if p in some]
        keys, column = by_prompt(x[rows], [prompts[i] for i in rows])
        parts.update(keys, diversity=column)
    assert parts.figures() == whole.figures()
    assert by_prompt(x[5:6], [5])[0] == []


def test_diversity_falls_when_samples_repeat():
    """8 samples of each of 12 prompts, of which ever more are copies of the first."""
    x = gaussian(96, 16).view(12, 8, 16)
    prompts = torch.arange(12).repeat_interleave(8).tolist()
    for figure in (mean_pairwise, partial(mean_pairwise, distance=cosine_distance), vendi):
        means = []
        for copies in range(8):
            y = x.clone()
            y[:, 1 : 1 + copies] = x[:, :1]
            means.append(by_prompt(y.flatten(0, 1), prompts, figure)[1].mean().item())
        assert all(a > b for a, b in itertools.pairwise(means)), means
        assert means[-1] == pytest.approx(1 if figure is vendi else 0, abs=1e-6)


def test_ratio_is_that_of_the_means_with_a_paired_error():
    """Half of the teacher's diversity in every prompt: ratio 1/2 without error, however far prompts are apart."""
    teacher = torch.tensor([1.0, 5, 20, 100])
    assert ratio(teacher / 2, teacher) == (0.5, pytest.approx(0, abs=1e-12))
    value, error = ratio(torch.tensor([1.0, 3]), torch.tensor([2.0, 6]).flip(0))
    assert value == 0.5
    assert error > 0.1  # resamples of one prompt twice: 1/6 and 3/2


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        mean_pairwise(gaussian(1, 3))
    with pytest.raises(ValueError, match=r"features must be \(n, D\)"):
        vendi(gaussian(0, 3))
    with pytest.raises(ValueError, match="3 samples and 2 prompts"):
        by_prompt(gaussian(3, 2), [0, 1])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\) values"):
        ratio(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="no diversity to compare with"):
        ratio(torch.ones(2), torch.zeros(2))
