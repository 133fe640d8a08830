"""Streaming moments, standard error and extrapolation; equality with the libraries on features."""

from __future__ import annotations

import math
import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fewstep.metrics.features import Kept
from fewstep.metrics.frechet import (
    Moments,
    Running,
    frechet,
    frechet_distance,
    frechet_figure,
    frechet_infinity,
    moments,
)
from fewstep.metrics.statistics import Statistics


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def state(features: torch.Tensor, *parts: int, name: str = "x", groups: int = 10) -> Running:
    found = Running(name, groups)
    for part in features.split(list(parts) or len(features)):
        found.update(part)
    return found


STANDARD = Statistics(torch.zeros(4).double(), torch.eye(4).double())


def test_equal_to_scipy_and_to_both_libraries():
    """Three ways to take the root: a general matrix root, and eigenvalues of the product that is not symmetric."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    x, y = normal(300, 24, seed=0), normal(250, 24, seed=1) @ normal(24, 24, seed=2) + 0.3
    ours = frechet_distance(x, y)
    c1, c2 = x.T.cov(), y.T.cov()
    root = torch.from_numpy(np.real(sqrtm((c1 @ c2).numpy())))
    by_root = ((x.mean(0) - y.mean(0)).square().sum() + (c1 + c2 - 2 * root).trace()).item()
    assert ours == pytest.approx(by_root, rel=1e-9)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert ours == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-9)
    assert ours == pytest.approx(_compute_fid(x.mean(0), c1, y.mean(0), c2).item(), rel=1e-9)


def test_large_known_gaussians():
    """Covariances with common axes, D = 256: |m|^2 + sum (s1 - s2)^2."""
    axes = torch.linalg.qr(normal(256, 256, seed=3)).Q
    s1, s2 = (normal(256, seed=seed).abs() for seed in (4, 5))
    mean = normal(256, seed=6)
    a = Statistics(torch.zeros(256).double(), (axes * s1**2) @ axes.T)
    b = Statistics(mean, (axes * s2**2) @ axes.T)
    assert frechet(a, b) == pytest.approx((mean.square().sum() + (s1 - s2).square().sum()).item(), rel=1e-9)


@pytest.mark.parametrize("parts", [(1,) * 130 + (8871,), (4001, 5000), (64,) * 140 + (41,), (4000, 4000, 1001)])
def test_any_split_gives_the_same_bits(parts):
    x = normal(9001, 5, seed=7).float()
    whole, split = state(x), state(x, *parts)
    for a, b in zip(whole.groups(), split.groups(), strict=True):
        assert a.n == b.n
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.scatter, b.scatter)
    for g, group in enumerate(split.groups()):
        torch.testing.assert_close(group.mean, x[g::10].double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.moments().covariance, x.double().T.cov(), rtol=1e-10, atol=1e-12)


def test_two_processes_give_what_one_gives():
    """Images dealt in turn, batches of 7: with their numbers the standard error is the same as well."""
    x, reference = normal(9001, 5, seed=8), moments(normal(5000, 5, seed=9))
    one = frechet_figure(state(x), reference)
    states = [Running("x"), Running("x")]
    for p, seen in enumerate(states):
        for keys in torch.arange(p, 9001, 2).split(7):
            seen.update(x[keys], keys.tolist())
    first, second = (pickle.loads(pickle.dumps(seen)) for seen in states)
    both = first + second
    assert both.n == 9001
    assert frechet_figure(both, reference) == pytest.approx(one, rel=1e-8)
    both.update(x[:100])  # and goes on
    torch.testing.assert_close(both.moments().mean, torch.cat([x, x[:100]]).mean(0))
    with pytest.raises(ValueError, match="one key for each of 100 images"):
        both.update(x[:100], [1, 2])


def test_kept_features_know_their_images():
    """Two processes, the second of which was padded with image 0 to the same number of batches."""
    x = normal(31, 3, seed=10)
    first, second = Kept("x"), Kept("x")
    for keys in torch.arange(0, 31, 2).split(5):
        first.update(x[keys], keys.tolist())
    second.update(x[1::2], range(1, 31, 2))
    second.update(x[:1], [0])
    for both in (first + second, second + first):
        assert torch.equal(both.tensor(), x)
    alone = Kept("x")
    for part in x.split(4):
        alone.update(part)
    assert torch.equal(alone.tensor(), x)
    with pytest.raises(ValueError, match="features of x and of y do not add"):
        alone + Kept("y")
    with pytest.raises(ValueError, match=r"got \(31, 2\) after \(B, 3\)"):
        alone.update(x[:, :2])
    with pytest.raises(ValueError, match="no features y were seen"):
        Kept("y").tensor()
    with pytest.raises(ValueError, match="features x of image 8 are not finite"):
        alone.update(torch.tensor([[0, 0, 0], [0, torch.nan, 0]]), [5, 8])


def test_memory_does_not_grow_with_images():
    """Tensors that a state holds: the groups, and less than one block of rows."""
    found = Running(groups=2)

    def held() -> int:
        kept = [
            *(rows for rows, _ in found._waiting),
            *(t for g in found._groups if g is not None for t in (g.mean, g.scatter)),
        ]
        return sum(t.untyped_storage().nbytes() for t in kept)

    x = torch.randn(3 * Running.BLOCK, 64, generator=torch.Generator().manual_seed(0))
    most = []
    for _ in range(8):
        found.update(x)
        most.append(held())
    assert found.n == 24 * Running.BLOCK
    assert max(most) <= 2 * 8 * (64 * 64 + 64) + 2 * Running.BLOCK * 64 * 4
    assert most[-1] == most[-3]


def test_standard_error_is_the_spread_of_repeated_sets():
    """Against a known reference; the jackknife of 10 groups scatters by a quarter, its mean over 40 sets does not."""
    found = [frechet_figure(state(normal(2000, 4, seed=s) + 0.5), STANDARD) for s in range(40)]
    spread = torch.tensor([value for value, _ in found]).std().item()
    errors = torch.tensor([error for _, error in found])
    assert errors.mean().item() == pytest.approx(spread, rel=0.3)
    # |m|^2 = 4 / 4 of the mean dominates: standard error 2 |m| / sqrt(N)
    assert errors.mean().item() == pytest.approx(2 / math.sqrt(2000), rel=0.15)


@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_extrapolation_takes_the_bias_away():
    """Unit Gaussians in 16 dimensions at the known distance 16 * 0.3^2, 400 samples, 30 sets."""
    reference = Statistics(torch.zeros(16).double(), torch.eye(16).double())
    sets = [state(normal(400, 16, seed=100 + s) + 0.3) for s in range(30)]
    raw = torch.tensor([frechet_figure(s, reference)[0] for s in sets])
    found = [frechet_infinity(s, reference) for s in sets]
    values = torch.tensor([value for value, _ in found])
    noise = (values.std() / math.sqrt(30)).item()
    bias = raw.mean().item() - 16 * 0.09
    assert bias > 16 / 400  # of the mean alone
    assert abs(values.mean().item() - 16 * 0.09) < max(0.1 * bias, 3 * noise)
    assert abs(values.mean().item() - 16 * 0.09) < 0.5 * bias
    errors = torch.tensor([error for _, error in found])
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35)


def test_few_samples_are_told_with_the_bias():
    """tr C / N of the mean: 8 unit variances, 16 samples give about 0.5."""
    reference = Statistics(torch.zeros(8).double(), torch.eye(8).double())
    x = normal(39, 8, seed=11)
    with pytest.warns(UserWarning, match=r"39 samples in 8 dimensions: biased upwards") as told:
        frechet_figure(state(x), reference)
    assert f"by {x.T.cov().trace().item() / 39:.3g} for the mean" in str(told[0].message)
    with pytest.warns(UserWarning, match="covariance is singular"):
        frechet_figure(state(x[:8]), reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_figure(state(torch.cat([x, x[:1]])), reference)


def test_bad_features_are_refused_in_one_line():
    x = normal(50, 4, seed=12)
    broken = x.clone()
    broken[3, 2] = float("nan")
    found = state(x, name="inception-64-tf1")
    with pytest.raises(ValueError, match="inception-64-tf1 of images 50 to 100 are not finite"):
        found.update(broken)
    with pytest.raises(ValueError, match="3 dimensions after others of 4"):
        found.update(x[:, :3])
    assert found.n == 50
    with pytest.raises(ValueError, match="needs at least 2 feature vectors; got 1"):
        frechet_figure(state(x[:1]), STANDARD)
    with pytest.raises(ValueError, match="no features x were seen"):
        frechet_figure(Running("x"), STANDARD)
    with pytest.raises(ValueError, match="of 4 and of 3 dimensions"):
        frechet_figure(state(x[:, :3]), STANDARD)
    with pytest.raises(ValueError, match="seen by a cannot be compared with a reference of b"):
        frechet_figure(state(x, name="a"), STANDARD._replace(features="b"))
    with pytest.raises(ValueError, match="do not add"):
        state(x, name="a") + state(x, name="b")
    with pytest.raises(ValueError, match="needs 4 groups"):
        frechet_infinity(state(x, groups=3), STANDARD)


def test_inceptions_dimensions_take_seconds():
    """2048 dimensions, full rank: a second or two of one core; eigenvalues of the general product take far longer."""
    x = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(13))
    a = moments(x[:3000])
    b = Moments(a.n, a.mean + 0.5, a.scatter * 4)  # C2 = 4 C1: |m|^2 + tr C1
    began = time.process_time()
    assert frechet(a, b) == pytest.approx(2048 * 0.25 + a.covariance.trace().item(), rel=1e-9)
    assert time.process_time() - began < 10  # of all cores
