"""Losses on tensors against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.distill.objectives.divergence import mean_gap, reverse_kl, spread, surrogate
from fewstep.distill.objectives.levels import even_levels, start_scale
from fewstep.distill.objectives.robust import pseudo_huber
from fewstep.samplers.noise import EDM, Flow, TrigFlow
from tests.closed_form import vp


def test_pseudo_huber():
    """Pythagorean triples: errors 0, 3, 4 and -12, c = 4, 4, 3, 5: sqrt(e^2 + c^2) - c = 0, 1, 2, 8."""
    for error, c, expected in [(0, 4, 0), (3, 4, 1), (4, 3, 2), (-12, 5, 8)]:
        assert pseudo_huber(torch.tensor([error + 1.0]), torch.tensor([1.0]), c).item() == expected
    # elementwise, then the mean; the norm of the whole sample would give sqrt(9 + 16 + 16) - 4
    two = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    assert pseudo_huber(two, torch.zeros(2, 2), 4).item() == 0.5


def test_pseudo_huber_gradient():
    """e / sqrt(e^2 + c^2) / N: 3/5 and -4/sqrt(32) over two elements; never above 1 / N, however large the error."""
    prediction = torch.tensor([3.0, -4.0], requires_grad=True)
    pseudo_huber(prediction, torch.zeros(2), 4.0).backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == pytest.approx([0.3, -0.5 / math.sqrt(2)], rel=1e-6)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.3, 0.7), (1.0, 5.0)], ids=["vp", "flow", "edm"])
def test_reverse_kl_is_the_derivative_of_the_kl(alpha: float, sigma: float):
    """Student m + k z, teacher N(mu, S^2); variances of x_t are A = alpha^2 k^2 + sigma^2 and B = alpha^2 S^2 + sigma^2.

    KL(N(alpha m, A) || N(alpha mu, B)) = (A + alpha^2 (m - mu)^2) / 2B - log(A / B) / 2 - 1/2, so that
    dKL/dk = alpha^2 k (1/B - 1/A) and dKL/dm = alpha^2 (m - mu) / B. By the chain rule they are the means of
    (alpha / sigma)^2 (F - R) times dx0/dk = z and dx0/dm = 1.
    """
    m, k, mu, std = 0.4, 0.9, -0.7, 1.7
    z, eps = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]]).double()  # exact for quadratics
    x0 = m + k * z
    x_t = alpha * x0 + sigma * eps
    a, b = alpha**2 * k**2 + sigma**2, alpha**2 * std**2 + sigma**2
    fake = m + alpha * k**2 / a * (x_t - alpha * m)
    teacher = mu + alpha * std**2 / b * (x_t - alpha * mu)
    g = (alpha / sigma) ** 2 * reverse_kl(teacher, fake)
    assert (g * z).mean().item() == pytest.approx(alpha**2 * k * (1 / b - 1 / a), rel=1e-12)
    assert g.mean().item() == pytest.approx(alpha**2 * (m - mu) / b, rel=1e-12)


def test_mean_gap():
    """|1 - 3| and |2 - 2|, mean 1; |0 - 3| twice, mean 3; a gap of nothing is 1e-3. One number a sample."""
    x0 = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]]).reshape(3, 1, 1, 2)
    teacher = torch.tensor([[3.0, 2.0], [3.0, -3.0], [5.0, 5.0]]).reshape(3, 1, 1, 2)
    gap = mean_gap(x0, teacher)
    assert gap.shape == (3, 1, 1, 1)
    assert gap.flatten().tolist() == pytest.approx([1, 3, 1e-3])


def test_surrogate():
    """Direction (3, 4) over 4 elements: gradient d / 4, value 0.5 (9 + 16) / 4; where x0 is makes no difference."""
    direction = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    for start in (0.0, -7.0):
        x0 = torch.full((2, 2), start, requires_grad=True)
        loss = surrogate(x0, direction)
        loss.backward()
        assert x0.grad is not None
        assert torch.equal(x0.grad, direction / 4)
        assert loss.item() == 25 / 8


def test_spread():
    """Columns (0, 2) and (1, 7): standard deviations sqrt 2 and 3 sqrt 2; of one sample there is none."""
    assert spread(torch.tensor([[0.0, 1.0], [2.0, 7.0]])).item() == pytest.approx(2 * math.sqrt(2))
    assert spread(torch.ones(1, 4)).item() == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8])
def test_even_levels_of_a_table_are_diffusers_trailing_timesteps(steps: int):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    levels = even_levels(vp(), steps)
    assert [round(1000 * v) - 1 for v in levels] == scheduler.timesteps.tolist()
    assert even_levels(Flow(3.0), steps) == [1 - i / steps for i in range(steps)]


def test_start_scale():
    """Stable Diffusion starts from N(0, I), not from its own sigma; EDM from sigma_max."""
    assert [start_scale(n) for n in (vp(), Flow(3.0), TrigFlow(), EDM(sigma_max=80.0))] == [1, 1, 1, 80]
