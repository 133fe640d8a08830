"""f-divergences: h from f itself, gradients from the divergences themselves by quadrature, the ratio by numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.methods.distribution_matching import Draws
from fewstep.distill.objectives import implicit
from fewstep.distill.objectives.divergence import reverse_kl, sid
from fewstep.distill.objectives.f_divergence import H, density_ratio, uni_instruct, weights
from tests.distill.exact import Laws, assert_relative, exact, rows
from tests.distill.runs import config

F: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "jf": lambda r: (r - 1) * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "sf": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "pearson": lambda r: (r - 1) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / r,
    "sh": lambda r: (r.sqrt() - 1) ** 2,
}

# a student wider than its teacher: every moment of r and 1/r that appears is finite
MU, S, M, K, ALPHA, NU = 0.7, 0.8, 0.2, 1.1, 0.6, 0.6
P, Q = S**2 + NU**2, K**2 + NU**2
SHARES = {  # (r h', -r^2 h'') of the paper's table
    "rkl": lambda r: (0 * r, 0 * r),
    "kl": lambda r: (r, 0 * r),
    "jf": lambda r: (r, 0 * r),
    "js": lambda r: (r / (1 + r) ** 2, 2 * r**2 / (1 + r) ** 3),
    "sf": lambda r: (-r / (1 + r) ** 2, -2 * r**2 / (1 + r) ** 3),
    "pearson": lambda r: (4 * r**2, -4 * r**2),
    "neyman": lambda r: (-2 / r, -4 / r),
    "sh": lambda r: (r.sqrt() / 4, r.sqrt() / 8),
}


def line(n: int) -> tuple[Tensor, Tensor]:
    """Points and masses of a standard normal: the trapezoid rule, exact to rounding for what is smooth and decays."""
    x = torch.linspace(-14, 14, n, dtype=torch.float64)
    return x, torch.softmax(-(x**2) / 2, 0)


def log_ratio(y: Tensor, m: Tensor | float, q: Tensor | float) -> Tensor:
    """log of N(MU, P) over N(m, q) at y = x_t / alpha."""
    q = torch.as_tensor(q, dtype=torch.float64)
    return ((y - m) ** 2 / q - (y - MU) ** 2 / P) / 2 + (q / P).log() / 2


def h_of(f: str, r: Tensor) -> Tensor:
    """r^2 f''(r) of f itself."""
    x = r.clone().requires_grad_()
    (first,) = torch.autograd.grad(F[f](x).sum(), x, create_graph=True)
    return r**2 * torch.autograd.grad(first.sum(), x)[0]


@pytest.mark.parametrize("f", F)
def test_weights(f: str):
    """h = r^2 f'' of f itself, and its derivatives as in the paper's table."""
    r = torch.tensor([0.2, 0.7, 1.0, 1.6, 5.0]).double()
    h, slope, curve = weights(r, f)
    assert torch.allclose(h, h_of(f, r), rtol=1e-10)
    wanted_slope, wanted_curve = SHARES[f](r)
    assert torch.allclose(slope, wanted_slope, atol=1e-12)
    assert torch.allclose(-curve, wanted_curve, atol=1e-12)
    assert H.keys() == F.keys()


def divergences(f: str) -> tuple[Tensor, Tensor]:
    """Derivatives in (m, k) of I(nu) = E_q[h |delta|^2] / nu^4 and of D_f = E_q f(r), by autograd of quadratures."""
    theta = torch.tensor([M, K]).double().requires_grad_()
    u, mass = line(2001)
    q = theta[1] ** 2 + NU**2
    y = theta[0] + q.sqrt() * u
    r = log_ratio(y, theta[0], q).exp()
    scores = (y - theta[0]) / q - (y - MU) / P  # s_p - s_q
    expanded = (mass * H[f](r) * scores**2).sum()
    return tuple(torch.autograd.grad(v, theta, retain_graph=True)[0] for v in (expanded, (mass * F[f](r)).sum()))  # type: ignore[return-value]


def teacher(x_t: Tensor) -> Tensor:
    return MU + S**2 / P * (x_t / ALPHA - MU)


def fake(x_t: Tensor) -> Tensor:
    return M + K**2 / Q * (x_t / ALPHA - M)


def draws() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z and eps on a grid, their masses, and the exact ratio at x_t of the student M + K z."""
    z, mass = (v[..., None] for v in line(401))
    z, eps = z.repeat_interleave(401, 0), z.repeat(401, 1)
    ratio = log_ratio(M + K * z[:, 0] + NU * eps[:, 0], M, Q).exp()
    return z, eps, (mass @ mass.T).reshape(-1), ratio


def gradient(f: str, exact_form: bool) -> Tensor:
    """Means of d and d z over z and eps, over nu^4."""
    z, eps, mass, ratio = draws()
    nu = torch.tensor(NU, dtype=torch.float64)
    potential = partial(uni_instruct, ratio=weights(ratio, f), nu=nu, exact=exact_form, bound=float("inf"))
    d, *_ = implicit.direction(potential, M + K * z, lambda x: ALPHA * (x + NU * eps), teacher, fake)
    return torch.stack([(mass * d[:, 0]).sum(), (mass * d[:, 0] * z[:, 0]).sum()]) / NU**4


@pytest.mark.parametrize("f", F)
def test_the_exact_gradient_is_that_of_the_expanded_divergence(f: str):
    """Student M + K z at one level: means of d and d z over z and eps are dI/dm and dI/dk, times nu^4."""
    found = gradient(f, exact_form=True)
    wanted, at_level = divergences(f)
    assert_relative(found, wanted)

    # f-distill: h (F - R) / nu^2 is the gradient of D_f at this level
    z, eps, mass, ratio = draws()
    x0 = M + K * z
    r, fk = teacher(ALPHA * (x0 + NU * eps)), fake(ALPHA * (x0 + NU * eps))
    d = weights(ratio, f)[0][:, None] * reverse_kl(r, fk) / NU**2
    found = torch.stack([(mass * d[:, 0]).sum(), (mass * d[:, 0] * z[:, 0]).sum()])
    assert_relative(found, at_level)


def test_the_published_form():
    """At h = 1 it is SiD's potential at alpha 1."""
    x0, r, f = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    ones = weights(torch.ones(3).double(), "rkl")
    assert torch.allclose(uni_instruct(x0, r, f, ones, torch.ones(3, 1), exact=False), sid(x0, r, f, 1.0))


@pytest.mark.parametrize("f", F)
def test_the_published_form_at_the_exact_ratio(f: str):
    """With s_p and s_q the two scores at y, the student's law N(m, Q),

    d / nu^2 = h [(s_p - s_q)' eta - nu^2 (s_p - s_q) / Q], E[eta | y] = 0, E[eta z | y] = -k nu^2 / Q, E[z | y] = k (y - m) / Q:
    E d / nu^4 = -E_q[h (s_p - s_q)] / Q and E d z / nu^4 = -k E_q[h ((s_p - s_q)' + (s_p - s_q)(y - m) / Q)] / Q,
    integrals over y alone, with h of f itself.
    """
    u, mass = line(2001)
    y = M + Q**0.5 * u
    h, scores = mass * h_of(f, log_ratio(y, M, Q).exp()), (y - M) / Q - (y - MU) / P
    slope = 1 / Q - 1 / P + scores * (y - M) / Q
    assert_relative(gradient(f, exact_form=False), torch.stack([-(h * scores).sum() / Q, -K * (h * slope).sum() / Q]))


def test_the_published_form_by_hand():
    """Of kl, h = r turns means over the student into means over the teacher. With D = m - mu and d as above,

    E d / nu^4 = -E_p(s_p - s_q) / Q = D / Q^2, half the exact form's dI/dm = 2 D / Q^2, and
    E d z / nu^4 = k (1/P - 1/Q) / Q - k ((P + D^2) / Q - 1) / Q^2, which is not half of dI/dk: h is held.
    Of rkl, h = 1: D / (P Q) and 2 k (1/P - 1/Q) / Q. Of jf, h = 1 + r: the sum of the two.
    """
    D = M - MU
    kl = torch.tensor([D / Q**2, K * (1 / P - 1 / Q) / Q - K * ((P + D**2) / Q - 1) / Q**2]).double()
    rkl = torch.tensor([D / (P * Q), 2 * K * (1 / P - 1 / Q) / Q]).double()
    for f, wanted in (("kl", kl), ("rkl", rkl), ("jf", kl + rkl)):
        assert_relative(gradient(f, exact_form=False), wanted)
    half = gradient("kl", exact_form=True) / 2
    assert torch.allclose(half[0], kl[0], rtol=1e-6)
    assert abs(half[1] / kl[1] - 1) > 0.1


@pytest.mark.parametrize("f", ["kl", "js", "pearson"])
def test_without_the_networks_inputs_it_would_be_f_distill(f: str):
    """Under no_grad the published form is h (F - R), the exact one along it, too: neither is Uni-Instruct's."""
    x0, r, fk = (torch.randn(2, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    ratio = weights(torch.tensor([0.6, 1.7]).double(), f)

    def teacher(x_t: Tensor) -> Tensor:
        return r + 0.7 * x_t.tanh()

    def fake(x_t: Tensor) -> Tensor:
        return fk + 0.2 * x_t.square()

    for exact_form in (False, True):
        potential = partial(uni_instruct, ratio=ratio, nu=torch.tensor(NU), exact=exact_form)
        found, *scores = implicit.direction(potential, x0, lambda x: 0.8 * x, teacher, fake)
        held = [torch.no_grad()(network) for network in (teacher, fake)]
        d, *_ = implicit.direction(potential, x0, lambda x: 0.8 * x, *held, split=False)
        distilled = ratio[0][:, None] * reverse_kl(*scores)
        assert torch.allclose(torch.cosine_similarity(d, distilled, 1), torch.ones(2).double(), rtol=1e-12)
        assert torch.allclose(d, distilled, rtol=1e-12) is not exact_form
        # half of f_distill's own size, at least; the exact form's push along it, bounded by 10, is larger than both
        assert ((found - d).norm(dim=1) > 0.5 * distilled.norm(dim=1)).all()
        assert exact_form or (torch.cosine_similarity(found, d, 1) < 0.97).all()


def test_density_ratio():
    """Mean logit, exponentiated, within [0.1, 20], with the mean 1 among like levels: of 32 samples in two halves."""
    logits = torch.tensor([[0.0, 2.0], [1.0, 1.0], [90.0, 90.0], [-90.0, -90.0]])
    raw = torch.tensor([2.71828, 2.71828, 20, 0.1])
    assert torch.allclose(density_ratio(logits.repeat(4, 1), torch.rand(16)), (raw / raw.mean()).repeat(4), rtol=1e-5)
    assert torch.allclose(density_ratio(logits, torch.rand(4)), raw, rtol=1e-5)  # of few as it is
    t = torch.linspace(0, 1, 32)
    r = density_ratio(torch.where(t < 0.5, 1.0, 2.0)[:, None], t)
    assert torch.allclose(r, torch.ones(32))  # each half by itself
    assert not torch.allclose(density_ratio(torch.where(t < 0.5, 1.0, 2.0)[:, None], t, bins=1), torch.ones(32))
    rising, order = torch.linspace(-1, 1, 32)[:, None], torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(density_ratio(rising[order], t[order]), density_ratio(rising, t)[order])  # in any order
    raw = rising[:31, 0].exp()
    assert torch.allclose(density_ratio(rising[:31], t[:31]), raw / raw.mean())  # of 31 no half has 16


def test_the_exact_forms_push_is_bounded():
    """kl at r = 1, nu = 1, four elements of delta = 1: 2 <delta, eta> = 8 eta is 24, -24 and 4; d is -2 + at most 10."""
    fake = torch.tensor([3.0, -3.0, 0.5])[:, None].expand(3, 4)
    x0 = torch.zeros(3, 4, requires_grad=True)
    value = uni_instruct(x0, fake + 1, fake, weights(torch.ones(3), "kl"), torch.ones(3, 1), exact=True)
    (found,) = torch.autograd.grad(value.sum(), x0)
    assert torch.allclose(found, torch.tensor([8.0, -12.0, 2.0])[:, None].expand(3, 4))


# in the method


BASE: dict[str, Any] = {"method": "uni_instruct", "weight": "none", "gan_weight": 0.0, "train_data": "in memory"}


@pytest.mark.parametrize("f", F)
@pytest.mark.parametrize("exact_form", [True, False])
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_the_method_is_the_potential_with_a_normalised_ratio(name: str, exact_form: bool, f: str, tmp_path: Path):
    """h, r h', r^2 h'' divided by the mean of h; nu of each row's level; f_distill has the same h."""
    x = Laws()
    made = exact(tmp_path, name, x, **BASE, exact_divergence=exact_form, f=f)
    batch, x0, t, eps = rows(made, x)
    assert batch.condition is not None
    ratio = torch.linspace(0.5, 2, 16).double()
    found, teacher_x0, fake_x0 = made.direction(x0, t, eps, batch.condition, 1.0, ratio)
    h, slope, curve = (v / h_of(f, ratio).mean() for v in weights(ratio, f))
    a, s = made.noise.levels(t, x0)
    potential = partial(uni_instruct, ratio=(h, slope, curve), nu=s / a, exact=exact_form)
    wanted, *_ = implicit.direction(
        potential,
        x0,
        lambda x: made.noise.add(x, eps, t),
        lambda x_t: made.teacher.denoiser.x0(x_t, t, batch.condition),  # type: ignore[arg-type]
        lambda x_t: made.fake_score.denoiser.x0(x_t, t, batch.condition),  # type: ignore[arg-type]
    )
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)
    distilled = exact(tmp_path, name, x, **(BASE | {"divergence": "f_distill", "f": f}))
    d, *_ = distilled.direction(x0, t, eps, batch.condition, 1.0, ratio)
    assert torch.allclose(d, h.reshape(-1, 1, 1, 1) * (fake_x0 - teacher_x0), rtol=1e-10)


def test_one_row_has_its_own_weight(tmp_path: Path):
    """Over h(1), and not over its own h, which would make every f reverse KL."""
    x = Laws()
    made = exact(tmp_path, "vp", x, **(BASE | {"divergence": "f_distill", "f": "kl"}))
    batch, x0, t, eps = rows(made, x)
    assert batch.condition is not None
    ratio = torch.linspace(0.5, 2, 16).double()
    d, r, f = made.direction(x0[:1], t[:1], eps[:1], batch.condition[:1], 1.0, ratio[:1])
    assert torch.allclose(d, 0.5 * (f - r), rtol=1e-10)


def test_identities(tmp_path: Path):
    """Reverse KL, published form: SiD at alpha 1. A ratio of 1: every f alike, and f_distill is DMD."""
    x = Laws()

    def direction(**changes: Any) -> Tensor:
        made = exact(tmp_path, "vp", x, **(BASE | changes))
        batch, x0, t, eps = rows(made, x)
        assert batch.condition is not None
        # reverse KL's h is 1 whatever the ratio
        ratio = torch.linspace(0.5, 2, 16).double() if changes.get("f") == "rkl" else None
        return made.direction(x0, t, eps, batch.condition, 1.0, ratio)[0]

    unguided = {"fake_guidance_scale": 1.0, "guidance_scale": 1.0, "gan_weight": 0.0}
    one = direction(method="sid", **unguided)
    assert torch.allclose(direction(f="rkl"), one, rtol=1e-10)
    assert all(torch.allclose(direction(f=f), one, rtol=1e-10) for f in ("kl", "js", "sh"))
    dmd = direction(method="dmd2", **unguided)
    assert torch.allclose(direction(divergence="f_distill", f="js"), dmd, rtol=1e-10)
    assert not torch.allclose(dmd, one, rtol=0.1)


@pytest.mark.parametrize("exact_form", [True, False])
@pytest.mark.parametrize("divergence", ["uni_instruct", "f_distill"])
def test_reverse_kl_asks_for_no_ratio(divergence: str, exact_form: bool, tmp_path: Path):
    """Whose h is 1: prompts are enough, and no discriminator is trained; every other f has one, and needs images."""
    own: dict[str, Any] = {**BASE, "divergence": divergence, "exact_divergence": exact_form}
    for f in F:
        method = exact(tmp_path, "vp", Laws(), **own, f=f)
        assert (method.discriminator is None) is (f == "rkl")
        assert method.needs_of(method.config) == ({"prompts"} if f == "rkl" else {"prompts", "images"})
    made = exact(tmp_path, "vp", Laws(), **own, f="rkl")
    batch, x0, t, eps = rows(made, Laws())
    assert batch.condition is not None
    ratio = torch.linspace(0.5, 2, 16).double()
    told, untold = (made.direction(x0, t, eps, batch.condition, 1.0, r)[0] for r in (ratio, None))
    assert torch.equal(told, untold)
    assert untold.abs().max() > 1e-3
    own |= {"gan_weight": 0.1, "discriminator": "heads"}  # which have levels of their own where nobody reads a ratio
    for f in F:
        asked = config(tmp_path, **own, f=f)
        assert isinstance(asked, DistributionMatchingConfig)
        assert asked.discriminates
        assert asked.own_gan_levels is (f == "rkl")


def test_the_ratio_comes_from_the_discriminator(tmp_path: Path):
    """Through `loss`: logits of the divergence's own x_t after the warm-up, 1 before."""
    x = Laws()
    made = exact(tmp_path, "flow", x, **BASE, f="kl", gan_warmup_steps=5)
    made.discriminator = lambda x_t, t, condition: 0.5 * x_t.flatten(1)  # type: ignore[assignment]
    batch, x0, t, eps = rows(made, x)
    assert batch.condition is not None
    ratio = density_ratio(0.5 * made.noise.add(x0, eps, t).flatten(1), t)
    for iteration, r in ((4, None), (5, ratio)):
        leaf = x0.clone().requires_grad_()
        (losses,) = made.loss("student", batch, Draws(leaf, {"student": t}, {"student": eps}), iteration)
        (found,) = torch.autograd.grad(losses.total * x0.numel(), leaf)
        wanted, *_ = made.direction(x0, t, eps, batch.condition, 1.0, r)
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)
    assert (ratio - 1).abs().max() > 0.1
