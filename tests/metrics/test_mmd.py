"""KID against torch-fidelity, CMMD against a direct double sum."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.metrics.mmd import cmmd, gaussian, kid, polynomial, subset_mmds


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_kernels_by_hand():
    """<x, y> = 1 * 3 + 2 * 4 = 11 and |x - y|^2 = 8."""
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert polynomial(x, y).item() == pytest.approx((11 / 2 + 1) ** 3)
    assert polynomial(x, y, degree=2, gamma=2, offset=-1).item() == pytest.approx(21**2)
    assert gaussian(x, y, sigma=2).item() == pytest.approx(math.exp(-1))


def test_kid_is_torch_fidelitys():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    x, y = normal(230, 12, seed=0), normal(190, 12, seed=1) + 0.1
    theirs = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=50, verbose=False, rng_seed=2020)
    values = subset_mmds(x, y, subsets=20, size=50)
    assert values.mean().item() == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-10)
    assert values.std(correction=0).item() == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-10)
    value, error = kid(x, y, subsets=20, size=50)
    assert value == values.mean().item()
    assert error == pytest.approx(values.std().item() / 2)  # 230 samples hold four disjoint subsets


def test_kid_of_one_distribution_is_unbiased_and_its_error_is_the_spread():
    found = [kid(normal(300, 6, seed=s), normal(300, 6, seed=1000 + s), subsets=12, size=100) for s in range(30)]
    values, errors = (torch.tensor(part) for part in zip(*found, strict=True))
    spread = values.std().item()
    assert abs(values.mean().item()) < 3 * spread / math.sqrt(30)
    assert 0.5 < errors.mean().item() / spread < 2


@pytest.mark.parametrize(("m", "shift", "ratio"), [(120, 0.0, 1.4), (120, 0.3, 1.0), (260, 0.3, 1.0)])
def test_error_of_kid_is_the_spread_where_subsets_are_whole_sets(m: int, shift: float, ratio: float):
    """All subsets of 120 of 120 are one and the same: what they differ by says nothing.

    Of one distribution the first-order part is 0, and of the second the jackknife sees twice the variance.
    """
    found = [kid(normal(120, 6, seed=s) + shift, normal(m, 6, seed=1000 + s), 5, 120) for s in range(40)]
    values, errors = (torch.tensor(part) for part in zip(*found, strict=True))
    assert errors.mean().item() == pytest.approx(ratio * values.std().item(), rel=0.3)


def direct(x: torch.Tensor, y: torch.Tensor, sigma: float) -> float:
    """The definition, pair by pair."""

    def mean(a, b):
        return sum(math.exp(-(p - q).square().sum().item() / (2 * sigma**2)) for p in a for q in b) / (len(a) * len(b))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize("tile", [2048, 7])
def test_cmmd_is_the_double_sum(tile):
    """Unit vectors, as the authors' features are; any tiling."""
    x, y = (torch.nn.functional.normalize(f, dim=1) for f in (normal(33, 9, seed=2), normal(26, 9, seed=3) + 0.5))
    assert cmmd(x, y, tile=tile)[0] == pytest.approx(1000 * direct(x, y, 10), rel=1e-8)
    assert cmmd(x, y, sigma=0.5, scale=1, tile=tile)[0] == pytest.approx(direct(x, y, 0.5), rel=1e-10)
    assert cmmd(x.float(), y.float(), tile=tile)[0] == pytest.approx(1000 * direct(x, y, 10), rel=1e-5)


def test_cmmd_of_a_set_with_itself_is_nothing_and_does_not_see_order():
    x = normal(40, 5, seed=4)
    assert cmmd(x, x.flip(0))[0] == pytest.approx(0, abs=1e-9)
    y = normal(30, 5, seed=5)
    assert cmmd(x, y)[0] == pytest.approx(cmmd(x.flip(0), y.flip(0))[0], rel=1e-9)


@pytest.mark.parametrize("tile", [2048, 7])
def test_error_of_cmmd_leaves_out_every_tenth_image(tile):
    """Of one set at a time; variances of independent sets add."""
    x, y = normal(33, 3, seed=7), normal(26, 3, seed=8) + 0.5
    variance = 0.0
    for side in (0, 1):
        kept = [torch.arange(len((x, y)[side])) % 10 != g for g in range(10)]
        pairs = [(x[k], y) if side == 0 else (x, y[k]) for k in kept]
        without = torch.tensor([direct(a, b, 1) for a, b in pairs]).double()
        variance += 0.9 * (without - without.mean()).square().sum().item()
    assert cmmd(x, y, sigma=1, scale=1, tile=tile)[1] == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_error_of_cmmd_is_the_spread_of_repeated_sets():
    found = [cmmd(normal(300, 3, seed=s) + 1, normal(200, 3, seed=1000 + s), sigma=1, scale=1) for s in range(40)]
    values, errors = (torch.tensor(part) for part in zip(*found, strict=True))
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35)


def test_sets_that_cannot_be_compared_are_refused():
    x = normal(20, 4, seed=6)
    for function in (cmmd, kid):
        with pytest.raises(ValueError, match="of 4 and a reference of 3 dimensions"):
            function(x, x[:, :3])
        with pytest.raises(ValueError, match=r"reference must be features \(N, D\) of at least 2"):
            function(x, x[:1])
        with pytest.raises(ValueError, match="samples: features are not finite"):
            function(x / 0, x)
    with pytest.raises(ValueError, match=r"of 20 samples and 15 references a size of 2 to 15"):
        kid(x, x[:15])
