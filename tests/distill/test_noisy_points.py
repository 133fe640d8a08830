"""Samples that keep noise: what the fake score learns from them, and what the student's loss does where they are compared."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.methods.distribution_matching import DistributionMatching, Draws
from fewstep.distill.networks import require_grad
from fewstep.distill.objectives.fake_score import subinterval_error, x0_hat_error
from fewstep.distill.objectives.policy import Point
from fewstep.distill.random import Rngs
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.exact import EPS, SHIFT, Laws, Z, assert_relative, at, exact, gaussian, prompts_of
from tests.distill.gaussian import PROCESSES, Teacher, lora, method
from tests.pipelines import PROMPTS, tiny_stable_diffusion

MEAN, STD = [0.7, -0.4], [0.5, 1.3]


def minimiser(error: Any, noise: NoiseProcess, t: Tensor, x_t: Tensor) -> float:
    """The slope c of x0 = c x_t that minimises the mean of `error(output)`, a quadratic in c."""

    def gradient(c: float) -> Tensor:
        slope = torch.tensor(c).double().requires_grad_()
        x0 = slope * x_t
        (g,) = torch.autograd.grad(error(noise.output(x0, noise.eps_of_x0(x0, x_t, t), t)).mean(), slope)
        return g

    zero, one = gradient(0.0), gradient(1.0)
    return float(zero / (zero - one))


# the fake score's target


@pytest.mark.parametrize("rho", [0.0, 0.5, -0.6])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_target_is_the_denoiser_of_any_law(name: str, rho: float):
    """x_s = alpha_s x0 + sigma_s n, the two correlated: Tweedie's slope of x0 is (1 - sigma_t^2 / Var x_t) / alpha_t.

    Eight points have all second moments of (x0, n, xi) exactly. As elements of one sample their means of xi^2 and of
    the whole noise's square are 1 both where rho is 0 and else, so that TDM's importance weight is 1: its regression
    has the slope Cov(x0, x_t) / Var x_t, another one wherever part of the noise is the student's.
    """
    noise = PROCESSES[name]
    a_, b_, xi = (
        torch.tensor(v).double().reshape(1, 1, 2, 4) for v in zip(*product([1.0, -1.0], repeat=3), strict=True)
    )
    x0, n = 1.2 * a_, rho * a_ + (1 - rho**2) ** 0.5 * b_
    for low, high in ((0.4, 0.7), (0.0, 0.3), (0.75, 0.98)):
        s, t = (noise.shift(torch.tensor([v]).double()) for v in (low, high))
        x_s = noise.add(x0, n, s)
        x_t = noise.renoise(x_s, xi, s, t)
        (alpha_s, sigma_s), (alpha, sigma) = noise.levels(s, x_s), noise.levels(t, x_s)
        variance = x_t.square().mean()
        found = minimiser(lambda o: subinterval_error(o, x_s, xi, s, t, noise), noise, t, x_t)  # noqa: B023
        wanted = (1 - sigma**2 / variance) / alpha
        assert found == pytest.approx(wanted.item(), rel=1e-8, abs=1e-10)
        naive = minimiser(lambda o: x0_hat_error(o, x_t, x0, xi, t, noise), noise, t, x_t)  # noqa: B023
        regression = alpha / alpha_s * 1.2 * (1.2 * alpha_s + rho * sigma_s) / variance
        assert naive == pytest.approx(regression.item(), rel=1e-8)
        assert (abs(naive - found) < 1e-8) is (low == 0 or rho == 0)


def test_by_numbers():
    """Flow, s = 0.4, t = 0.7, unit variances, rho = 0.5: Var x_s 0.76, a 0.5, b^2 0.45, Var x_t 0.64.

    Tweedie's slope is (1 - 0.49 / 0.64) / 0.3 = 0.78125, that of x0_hat 0.5 (0.6 + 0.4 rho) / 0.64 = 0.625.
    """
    noise, rho = PROCESSES["flow"], 0.5
    a_, b_, xi = (
        torch.tensor(v).double().reshape(1, 1, 2, 4) for v in zip(*product([1.0, -1.0], repeat=3), strict=True)
    )
    s, t = torch.tensor([0.4]).double(), torch.tensor([0.7]).double()
    x_s = noise.add(a_, rho * a_ + 0.75**0.5 * b_, s)
    x_t = noise.renoise(x_s, xi, s, t)
    assert minimiser(lambda o: subinterval_error(o, x_s, xi, s, t, noise), noise, t, x_t) == pytest.approx(0.78125)
    assert minimiser(lambda o: x0_hat_error(o, x_t, a_, xi, t, noise), noise, t, x_t) == pytest.approx(0.625)


@pytest.mark.parametrize("name", PROCESSES)
def test_targets_agree_on_clean_samples(name: str):
    """At s = 0 the exact error is the plain one, and TDM's that of x0 with weight min(SNR, 5), whatever is predicted."""
    noise = PROCESSES[name]
    x0, xi, output = (randn((4, 1, 2, 2), generators(range(i, i + 4))).double() for i in (0, 10, 20))
    s, t = torch.zeros(4).double(), noise.shift(torch.tensor([0.05, 0.3, 0.6, 0.95]).double())
    x_t = noise.renoise(x0, xi, s, t)
    plain = (output - noise.output(x0, xi, t)).square()
    assert torch.allclose(subinterval_error(output, x0, xi, s, t, noise), plain, rtol=1e-8)
    alpha, sigma = noise.levels(t, x_t)
    wanted = (alpha / sigma).square().clamp(max=5) * (noise.x0(output, x_t, t) - x0).square()
    assert torch.allclose(x0_hat_error(output, x_t, x0, xi, t, noise), wanted, rtol=1e-8)


def test_the_published_weight():
    """Flow, output 0, so that x0 is x_t; x0_hat = (1, 1), n = (x_t - (1 - t) x0_hat) / t, and two rows' weights by hand.

    t = 0.5: n = (1, -1), xi = (2, 0), SNR 1, exp((2 - 1) / 2). t = 0.2: n = (2, 0), xi = (1, 1), SNR 16, held at 5,
    exp((1 - 2) / 2). Elsewhere the means of xi^2 and n^2 are one, and say nothing of the weight.
    """
    x_t = torch.tensor([[1.0, 0.0], [1.2, 0.8]]).double().reshape(2, 1, 1, 2)
    xi = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double().reshape(2, 1, 1, 2)
    t = torch.tensor([0.5, 0.2]).double()
    found = x0_hat_error(torch.zeros_like(x_t), x_t, torch.ones_like(x_t), xi, t, PROCESSES["flow"])
    high, low = math.exp(0.5), math.exp(-0.5)
    assert found.flatten().tolist() == pytest.approx([0, high, 5 * 0.04 * low, 5 * 0.04 * low])


@pytest.mark.parametrize("name", PROCESSES)
def test_the_error_is_bounded_down_to_the_samples_own_level(name: str):
    """In float32, at t = s and just above, where the variance of the unweighted target has no bound."""
    noise = PROCESSES[name]
    x_s, xi, output = (randn((3, 1, 2, 2), generators(range(i, i + 3))) for i in (0, 10, 20))
    s = torch.full((3,), 0.5)
    t = s + torch.tensor([0.0, 1e-6, 1e-3])
    assert subinterval_error(output, x_s, xi, noise.shift(s), noise.shift(t), noise).max() < 100


def test_the_published_target_is_an_option(tmp_path: Path):
    """On one draw the two losses differ; on points at level 0 they differ by the weight of the error alone."""
    found = {}
    for target in ("exact", "x0_hat"):
        made = exact(tmp_path, "flow", Laws(), method="tdm", fake_score_target=target)
        batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 4)
        draws = made.draw(batch, Rngs(0, 0, range(4)), 0, ["fake_score"])
        assert draws.point is not None
        draws.point = replace(draws.point, x=draws.x0 + 1)  # a point that its x0 does not determine
        (losses,) = made.loss("fake_score", batch, draws, 0)
        found[target] = losses.total.item()
    assert found["exact"] != pytest.approx(found["x0_hat"], rel=0.05)


# the student's gradient


def point(made: DistributionMatching, x: Tensor, x0: Tensor, s: Tensor) -> Point:
    """At level s, compared from there on."""
    s = s.expand(len(x))
    return Point(x, x0, torch.ones_like(s), made.noise.unshift(s), s)


def on_the_sample(made: DistributionMatching, x0: Tensor, t: Tensor, eps: Tensor, at: Point) -> Tensor:
    """What the student's loss does to its x0, times the number of elements."""
    x0 = x0.detach().clone().requires_grad_()
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * len(x0))
    draws = Draws(x0, {"student": t}, {"student": eps}, at)
    (losses,) = made.loss("student", batch, draws, 0)
    return torch.autograd.grad(losses.total, x0)[0] * x0.numel()


@pytest.mark.parametrize("name", PROCESSES)
def test_gradient_moments(name: str, tmp_path: Path):
    """Compared point x_s = m + q z with its exact fake score, V = a^2 q^2 + b^2, teacher N(mu, S^2), v_t, v_s its deviations:

    E[F - R] = (sigma_t^2 / alpha_s)(m - alpha_s mu) / v_t^2 and
    E[(F - R) z] = (sigma_t^2 / alpha_t) a^3 q (q^2 - v_s^2) / (V v_t^2), zero at m = alpha_s mu and q = v_s alone.
    The fake score of that law is the one of clean data N(m / alpha_s, (q^2 - sigma_s^2) / alpha_s^2).
    """
    laws = Laws()
    made = exact(tmp_path, name, laws, method="tdm", divergence="reverse_kl", weight="none", guidance_scale=2.0)
    mu = torch.tensor(laws.m + 2 * SHIFT, dtype=torch.float64)
    z, eps = (v.reshape(4, 1, 1, 1) for v in (Z, EPS))
    for low, high in ((0.5, 1.0), (1.0, 3.0), (0.0, 0.5)):
        s, t = at(made.noise, low, high)
        (alpha_s, sigma_s), (alpha, sigma) = ((made.noise.alpha(v), made.noise.sigma(v)) for v in (s, t))
        v_s, v_t = ((a**2 * laws.S**2 + b**2).sqrt() for a, b in ((alpha_s, sigma_s), (alpha, sigma)))
        for m, q in ((0.3, 1.2 * v_s), (alpha_s * mu, v_s)):
            gaussian(made, m / alpha_s, ((q**2 - sigma_s**2) / alpha_s**2).sqrt())
            x = m + q * z
            d = on_the_sample(made, x, t.expand(4), eps, point(made, x, x, s)).flatten()
            a = alpha / alpha_s
            v = a**2 * q**2 + sigma**2 - a**2 * sigma_s**2
            mean = sigma**2 / alpha_s * (m - alpha_s * mu) / v_t**2
            slope = sigma**2 / alpha * a**3 * q * (q**2 - v_s**2) / (v * v_t**2)
            if q == v_s:
                assert d.abs().max() < 1e-12
            else:
                assert_relative(d.mean(), mean)
                assert_relative((d * Z).mean(), slope)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_surrogate_is_tdms_huber_loss(name: str, tmp_path: Path):
    """Gradient of mean[(sqrt((x0 - y)^2 + h^2) - h) / mean |x0 - R|], y = sg[x0 + R - F], by autograd on the formula.

    R and F are the denoisers of N(m + SHIFT, S^2) and N(b, c^2) by Gauss' formula, and no network's.
    """
    h, law = 0.05, Laws()
    made = exact(tmp_path, name, law, method="tdm", huber_c=h, guidance_scale=1.0)
    x0, x, eps = (randn((4, 1, 1, 1), generators(range(i, i + 4))).double() for i in (0, 10, 20))
    (s,), t = at(made.noise, 0.3), at(made.noise, 0.4, 0.6, 1.0, 2.0)
    found = on_the_sample(made, x0, t, eps, point(made, x, x0, s)) / x0.numel()
    x_t = made.noise.renoise(x, eps, s.expand(4), t)
    alpha, sigma = made.noise.levels(t, x_t)
    r, f = (
        mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
        for mean, std in ((law.m + SHIFT, law.S), (law.b, law.c))
    )
    leaf = x0.clone().requires_grad_()
    w = (x0 - r).abs().mean((1, 2, 3), keepdim=True)
    loss = ((((leaf - (x0 + r - f)).square() + h * h).sqrt() - h) / w).mean()
    assert_relative(found, torch.autograd.grad(loss, leaf)[0], 1e-9, floor=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_fake_score_that_is_the_teacher_gives_exactly_nothing(kind: str, tmp_path: Path):
    if kind == "full":
        made = method(tmp_path, Teacher(PROCESSES["vp"], MEAN, STD), method="tdm", guidance_scale=1.0)
        batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 4)
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), perturbed=False, method="tdm", guidance_scale=1.0)
        batch = prompts_of(made.student.denoiser, PROMPTS * 2)
    require_grad(made.roles(), ["student"])
    draws = made.draw(batch, Rngs(0, 0, range(4)), 0, ["student", "fake_score"])
    (losses,) = made.loss("student", batch, draws, 0)
    assert losses.total.item() == 0
    losses.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.student.parameters.values())
