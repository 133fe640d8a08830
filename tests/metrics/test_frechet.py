import math

import pytest
import torch

from fewstep.metrics.frechet import Moments, frechet, frechet_distance, merge, moments, stderr


def gaussian(mean, covariance) -> Moments:
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    return Moments(2, torch.as_tensor(mean, dtype=torch.float64), covariance)  # scatter / (2 - 1)


def test_commuting_covariances():
    """Diagonal: |m|^2 + sum (s1 - s2)^2 = 9 + 16 + (1 - 2)^2 + (3 - 0)^2, one direction without spread."""
    a = gaussian([0, 0], torch.diag(torch.tensor([1.0, 9.0])))
    b = gaussian([3, 4], torch.diag(torch.tensor([4.0, 0.0])))
    assert frechet(a, b) == pytest.approx(35, rel=1e-12)
    assert frechet(b, a) == pytest.approx(35, rel=1e-12)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (M)^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2), M = C1 C2: no eigenvalue needed."""
    c1, c2 = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[5.0, -2.0], [-2.0, 1.0]])
    trace = (c1 @ c2).trace().item()
    root = math.sqrt(trace + 2 * math.sqrt(5 * 1))  # determinants 5 and 1
    assert frechet(gaussian([0, 0], c1), gaussian([1, 0], c2)) == pytest.approx(1 + 5 + 6 - 2 * root, rel=1e-12)


def test_against_the_general_matrix_root():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(60, 9, generator=g).double(),
        torch.randn(50, 9, generator=g).double() @ torch.randn(9, 9, generator=g).double(),
    )
    c1, c2 = x.T.cov(), y.T.cov()
    expected = (x.mean(0) - y.mean(0)).square().sum() + (c1 + c2).trace() - 2 * sqrtm((c1 @ c2).numpy()).trace().real
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_and_shift_adds_its_square():
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(1)).double()  # fewer vectors than dimensions
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 0.5) == pytest.approx(40 * 0.25, abs=1e-6)


def test_moments_in_parts_are_those_of_the_whole():
    """A large offset shows a sum of squares that cancels."""
    x = torch.randn(103, 5, generator=torch.Generator().manual_seed(2)).double() + 1e6
    whole, parts = moments(x), moments(x[:7])
    for part in x[7:].split(31):
        parts = merge(parts, moments(part))
    assert parts.n == 103
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.covariance, x.T.cov(), rtol=1e-6, atol=1e-7)


def test_finite_sets_are_biased_upwards_by_one_over_n():
    """Two sets of one unit Gaussian: E|m1 - m2|^2 = 2 D / N, and spread adds to it; doubling N halves it."""
    g = torch.Generator().manual_seed(3)

    def mean_distance(n: int) -> float:
        sets = [torch.randn(2, n, 8, generator=g) for _ in range(60)]
        return sum(frechet_distance(a, b) for a, b in sets) / len(sets)

    few, many = mean_distance(200), mean_distance(400)
    assert few > 2 * 8 / 200
    assert few / many == pytest.approx(2, rel=0.15)


def test_bootstrap_finds_the_error_of_a_mean():
    x = torch.randn(400, generator=torch.Generator().manual_seed(4)).double()
    error = stderr(lambda i: x[i].mean().item(), 400, resamples=2000)
    assert error == pytest.approx(x.std().item() / math.sqrt(400), rel=0.06)
    assert error == stderr(lambda i: x[i].mean().item(), 400, resamples=2000)
    difference = stderr(lambda i, j: (x[i].mean() - x[j].mean()).item(), 400, 400, resamples=2000)
    assert difference == pytest.approx(math.sqrt(2) * error, rel=0.06)  # sets are drawn independently


@pytest.mark.parametrize("shape", [(0, 3), (3,)])
def test_refuses_what_is_no_set(shape):
    with pytest.raises(ValueError, match="features must be"):
        moments(torch.zeros(shape))


def test_one_vector_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
