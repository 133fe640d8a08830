"""SIM: gradients of every distance against Stein's lemma, and its identity on a student that is no Gaussian."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.distill.objectives import implicit
from fewstep.distill.objectives.divergence import reverse_kl, sim
from tests.distill.exact import (
    RATIOS,
    SHIFT,
    Laws,
    assert_relative,
    at,
    exact,
    gaussian,
    levels,
    moments,
    on_the_sample,
    prompts_of,
    rows,
)
from tests.distill.gaussian import PROCESSES, Teacher, method

PLAIN = {"method": "sim", "guidance_scale": 1.0, "weight": "none"}
NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # of a standard normal


@pytest.mark.parametrize("name", PROCESSES)
def test_squared_distance(name: str, tmp_path: Path):
    """E d = 2 (b - m) s^4/(v_T v_F) and E d z = 4 a^2 c s^4 (c^2 - S^2)/(v_T v_F^2): SiD's at alpha 1, twice."""
    x = Laws()
    made = exact(tmp_path, name, x, **PLAIN, distance="squared")
    a, s = levels(made)
    v_t, v_f = a**2 * x.S**2 + s**2, a**2 * x.c**2 + s**2
    mean, slope = moments(made, x)
    assert_relative(mean, 2 * (x.b - x.m - SHIFT) * s**4 / (v_t * v_f))
    assert_relative(slope, 4 * a**2 * x.c * s**4 * (x.c**2 - x.S**2) / (v_t * v_f**2))


@pytest.mark.parametrize("distance", ["pseudo_huber", "power"])
@pytest.mark.parametrize("name", PROCESSES)
def test_any_distance(name: str, distance: str, tmp_path: Path):
    """Of one element: E d = (s^2/v_F) E d'(y), E d z = (2 a c s^2/v_F) k E d''(y), y ~ N(mean, k^2 v_F) (Stein's lemma).

    y = F - T has mean (b - m) s^2/v_T and slope k = a s^2 (c^2 - S^2)/(v_T v_F) in x_t. Gauss-Hermite in z and eps
    on one side, in x_t on the other; h = 1 is smooth enough for 80 nodes.
    """
    x, h, p = Laws(), 1.0, 1.5
    made = exact(tmp_path, name, x, **PLAIN, distance=distance, huber_c=h, distance_power=p)
    n = len(NODES)
    z, eps = (v.reshape(-1, 1, 1, 1) for v in torch.meshgrid(NODES, NODES, indexing="ij"))
    weight = (WEIGHTS[:, None] * WEIGHTS).flatten()
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * n * n)
    for t in at(made.noise, *RATIOS):
        a, s = made.noise.alpha(t), made.noise.sigma(t)
        v_t, v_f = a**2 * x.S**2 + s**2, a**2 * x.c**2 + s**2
        k = a * s**2 * (x.c**2 - x.S**2) / (v_t * v_f)
        y = ((x.b - x.m - SHIFT) * s**2 / v_t + k * v_f.sqrt() * NODES).requires_grad_()
        first = y / (y**2 + h * h).sqrt() if distance == "pseudo_huber" else p * y * (y**2 + h * h) ** (p / 2 - 1)
        (second,) = torch.autograd.grad(first.sum(), y)
        d = on_the_sample(made, batch, x.b + x.c * z, t.expand(n * n), eps).flatten()
        assert_relative((weight * d).sum(), s**2 / v_f * (WEIGHTS * first).sum())
        wanted = 2 * a * x.c * s**2 / v_f * k * (WEIGHTS * second).sum()
        assert_relative((weight * d * z.flatten()).sum(), wanted)


def test_the_norm_is_of_the_whole_sample(tmp_path: Path):
    """Student and teacher of one width: y = (b - m) s^2/v, the same everywhere, and E d = (s^2/v) y / sqrt(mean y^2 + c^2).

    Offsets 0.3 and -0.4 of two channels have the mean square 0.125; element by element the two would end up alike.
    """
    made = method(tmp_path, Teacher(PROCESSES["flow"], [0.7, -0.4], [0.5, 0.5], side=2), **PLAIN, huber_c=1e-3)
    for role in made.roles().values():
        role.denoiser.network.double()
    offset = torch.tensor([0.3, -0.4]).double().reshape(2, 1, 1)
    mean = made.teacher.denoiser.network.mean.detach() + SHIFT + offset
    gaussian(made, mean, 0.5)
    z, eps = (torch.tensor(v).double().reshape(4, 1, 1, 1) for v in ([1, 1, -1, -1], [1, -1, 1, -1]))
    t = torch.full((4,), 0.6).double()
    a, s = made.noise.alpha(t[0]), made.noise.sigma(t[0])
    share = s**2 / (a**2 * 0.25 + s**2)
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 4)
    d = on_the_sample(made, batch, (mean + 0.5 * z).expand(4, 2, 2, 2), t, eps.expand(4, 2, 2, 2)).mean(0)
    wanted = share * share * offset / ((share * offset).square().mean() + 1e-6).sqrt()
    assert_relative(d, wanted.expand(2, 2, 2))


@pytest.mark.parametrize("of_a_law", [True, False])
@pytest.mark.parametrize(("distance", "c"), [("squared", 1.0), ("pseudo_huber", 0.3), ("power", 0.3)])
def test_the_identity_on_a_student_that_is_no_gaussian(distance: str, c: float, of_a_law: bool):
    """A student of seven atoms x_i = g_i(theta), a teacher of two: exact denoisers, eps by quadrature, one level.

    Or a target that is the denoiser of no law, which would grow with x_t: what a node of DisBack's path may be.
    The potential's gradient in theta is that of E d(F_theta(x_t) - R(x_t)) with the x_t held where they are. With the
    slope d' taken for a constant it is another number, unless d is squared.
    """
    alpha, sigma = 0.8, 0.6
    places = torch.linspace(-1, 1, 7).double()
    theta = torch.tensor([0.3, 0.8, 0.5]).double()

    def atoms(theta: Tensor) -> Tensor:
        return theta[0] + theta[1] * places + theta[2] * places.cos()

    def denoiser(x_t: Tensor, atoms: Tensor) -> Tensor:
        shares = torch.softmax(-((x_t[:, None] - alpha * atoms) ** 2) / (2 * sigma**2), 1)
        return shares @ atoms

    def target(x_t: Tensor) -> Tensor:
        return denoiser(x_t, modes) if of_a_law else -(3 * x_t).sin()

    def potential(x: Tensor, r: Tensor, f: Tensor) -> Tensor:
        return sim(x, r, f, distance, c, 1.5) * weight[:, None]

    def d_of(y: Tensor) -> Tensor:
        if distance == "squared":
            return y**2
        return (y**2 + c * c).sqrt() if distance == "pseudo_huber" else (y**2 + c * c) ** 0.75

    grid = torch.linspace(-9, 9, 2001).double()  # the trapezoid rule is exact to rounding for what is smooth and decays
    density = torch.softmax(-(grid**2) / 2, 0)
    x0 = atoms(theta).repeat_interleave(len(grid))
    eps, weight = grid.repeat(7), density.repeat(7) / 7
    modes, held = torch.tensor([-0.7, 1.2]).double(), atoms(theta)

    def slope_of(d: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(atoms, theta).repeat_interleave(len(grid), 0)
        return (d.flatten()[:, None] * jacobian).sum(0)

    d, r, f = implicit.direction(
        potential,
        x0[:, None],
        lambda x: alpha * x + sigma * eps[:, None],
        lambda x: target(x[:, 0])[:, None],
        lambda x: denoiser(x[:, 0], held)[:, None],
    )
    parameters = theta.clone().requires_grad_()
    x_t = alpha * x0 + sigma * eps
    value = (weight * d_of(denoiser(x_t, atoms(parameters)) - target(x_t))).sum()
    (wanted,) = torch.autograd.grad(value, parameters)
    assert (slope_of(d) - wanted).abs().max() < 1e-6 * wanted.abs().max()

    slope = sim(torch.ones_like(r), r, f, distance, c, 1.5) / (1 - f)  # d', without graph
    frozen, *_ = implicit.direction(
        lambda x, r, f: slope / (f - r).detach() * (f - r) * (x - f) * weight[:, None],
        x0[:, None],
        lambda x: alpha * x + sigma * eps[:, None],
        lambda x: target(x[:, 0])[:, None],
        lambda x: denoiser(x[:, 0], held)[:, None],
    )
    assert torch.allclose(slope_of(frozen), wanted, rtol=1e-3) is (distance == "squared")


@pytest.mark.parametrize("distance", ["squared", "pseudo_huber", "power"])
def test_without_the_networks_inputs_it_would_be_dmd(distance: str):
    """Under no_grad the gradient is d'(F - R), along DMD's F - R in every sample, which SIM's is not."""
    x0, r, f = (torch.randn(2, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3))

    def potential(x: Tensor, r: Tensor, f: Tensor) -> Tensor:
        return sim(x, r, f, distance, 0.3, 1.5)

    def teacher(x_t: Tensor) -> Tensor:
        return r + 0.7 * x_t.tanh()

    def fake(x_t: Tensor) -> Tensor:
        return f + 0.2 * x_t.square()

    found, *scores = implicit.direction(potential, x0, lambda x: 0.8 * x, teacher, fake)
    held = [torch.no_grad()(network) for network in (teacher, fake)]
    d, *_ = implicit.direction(potential, x0, lambda x: 0.8 * x, *held, split=False)
    dmd = reverse_kl(*scores)
    size = dmd.square().mean(1, keepdim=True) + 0.09
    factor = {"squared": 2.0, "pseudo_huber": size**-0.5, "power": 1.5 * size**-0.25}[distance]
    assert torch.allclose(d, factor * dmd, rtol=1e-12)
    assert (torch.cosine_similarity(found, d, 1) < 0.97).all()


def test_a_distance_that_grows_is_the_squared_one(tmp_path: Path):
    """For c much larger than y: c times the pseudo-Huber's direction is half the squared one's."""
    x = Laws()
    huber = exact(tmp_path, "vp", x, **PLAIN, huber_c=1e4)
    squared = exact(tmp_path, "vp", x, **PLAIN, distance="squared")
    found, wanted = (on_the_sample(m, *rows(m, x)) for m in (huber, squared))
    assert torch.allclose(1e4 * found, wanted / 2, rtol=1e-6, atol=0)
