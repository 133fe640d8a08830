"""Presets of the distribution matching family beside each other: they differ, cost what they say, reach what they should."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Pairs
from fewstep.distill.family_config import Divergence, Noisy, OfRatio, Policy
from fewstep.distill.methods.distribution_matching import DistributionMatching, Draws
from fewstep.distill.networks import require_grad
from fewstep.distill.objectives.policy import Point
from fewstep.distill.presets import PRESETS
from fewstep.distill.random import Rngs
from fewstep.samplers.adapters import bare
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.exact import RATIOS, SHIFT, Laws, at, exact, prompts_of, rows
from tests.distill.gaussian import PROCESSES, Teacher, calls, laws, lora, method, rows_by_backward, under_training
from tests.distill.runs import config
from tests.distill.test_phased_dmd import Experts
from tests.pipelines import PROMPTS, tiny_stable_diffusion

ONE = {"guidance_scale": 2.0}  # guidances of the fake score stay the preset's


def direction(folder: Path, **changes: Any) -> Tensor:
    """At one state: a student, a fake score and a teacher that are all different, a discriminator of x_t, and pairs.

    All that the student's losses do to its output, which is the same whatever it is called with. A policy that compares
    where steps end has the samples with half the noise of the level, and noises them on.
    """
    x = Laws()
    defaults = {"gan_warmup_steps": 0, "train_data": "in memory", "regression_metric": "squared"}
    teacher = Experts if changes["method"] == "phased_dmd" else Teacher
    made = exact(folder, "vp", x, teacher, **(defaults | changes))
    if made.discriminator is not None:
        made.discriminator = lambda x_t, t, condition: x_t.flatten(1)  # type: ignore[assignment]
    with torch.no_grad():
        for network in made.fake_score.denoiser.networks.values():
            network.mean += 0.2
            network.gain.fill_(0.4)
    batch, x0, t, eps = rows(made, x)
    assert batch.condition is not None
    batch.pairs, point = Pairs(eps, 0.3 - 0.5 * eps, batch.condition), None
    if made.config.policy in Noisy:
        s = at(made.noise, *(ratio / 2 for ratio in RATIOS)).repeat_interleave(4)
        point = Point(made.noise.add(x0, -eps, s), x0, torch.ones_like(s), s, s)
    output = x0.clone().requires_grad_()
    made.student.denoiser.x0 = lambda *_: output  # type: ignore[method-assign]
    draws = Draws(output, {"student": t}, {"student": eps}, point)
    total = sum(losses.total for losses in made.loss("student", batch, draws, 0))
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, output)[0] * x0.numel()


def test_presets_differ(tmp_path: Path):
    """Of any two the directions are not even parallel: Phased DMD's is DMD2's at other points, DMD's that beside a regression."""
    found = {name: direction(tmp_path, method=name, **ONE) for name in PRESETS}
    assert all(d.abs().max() > 1e-3 for d in found.values())
    for one, other in combinations(found, 2):
        assert torch.cosine_similarity(found[one].flatten(), found[other].flatten(), 0) < 0.999, (one, other)


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [
        # SiD at alpha 1 is SIM with the squared distance, up to 2
        (
            {"method": "sid", "weight": "none", "fake_guidance_scale": 1.0},
            {"method": "sim", "distance": "squared"},
            2.0,
        ),
        (
            {"method": "sid", "fake_guidance_scale": 1.0},
            {"method": "sim", "distance": "squared", "weight": "mean_gap"},
            2.0,
        ),
        # SwiftBrush and DMD share the divergence, and differ in weight and guidance
        ({"method": "dmd2", "weight": "alpha_sigma", "fake_guidance_scale": 4.5}, {"method": "swiftbrush"}, 1.0),
        ({"method": "sid", "fake_guidance_scale": 4.5}, {"method": "sid_fewstep"}, 1.0),
        ({"method": "dmd", "regression_weight": 0.0}, {"method": "dmd2"}, 1.0),
        # TDM is DMD where its Huber form is quadratic: e / sqrt(e^2 + c^2) = e / c up to (e / c)^2
        ({"method": "tdm", "huber_c": 1.0e5, "policy": "backward_simulation"}, {"method": "dmd2"}, 1.0e5),
        # Phased DMD is TDM without Huber where their steps end at one level
        ({"method": "tdm", "divergence": "reverse_kl"}, {"method": "phased_dmd"}, 1.0),
    ],
)
def test_identities(one: dict, other: dict, factor: float, tmp_path: Path):
    a, b = direction(tmp_path, **(ONE | one)), direction(tmp_path, **(ONE | other))
    assert torch.allclose(factor * a, b, rtol=1e-9, atol=1e-14)
    assert b.abs().max() > 1e-3


def in_one_graph(method: str, x0: Tensor, r: Tensor, f: Tensor, nu: Tensor) -> Tensor:
    """The potential of each element, as its paper writes it, over DMD's normaliser; of js at ratio 1, h and its derivatives over h."""
    gap, eta = r - f, f - x0
    value = {
        "sid": gap * ((r - x0) - 1.2 * gap),
        "sim": gap / (gap.square().mean((1, 2, 3), keepdim=True) + 0.1**2).sqrt() * eta,
        "uni_instruct": 2 * gap * eta + 0.5 * gap**2,
    }[method]
    if method == "uni_instruct":
        inner, square = ((gap * v).sum((1, 2, 3), keepdim=True) for v in (eta, gap))
        value = value + (((inner + 0.5 * square) / nu**2).clamp(-10, 10) * gap).detach() * x0
    return value / (x0 - r).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3).detach()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["sid", "sim", "uni_instruct"])
def test_the_split_is_the_gradient_of_one_graph(name: str, kind: str, tmp_path: Path):
    """To 1e-12 in the student's own parameters, guided, with DMD's weight, against student, teacher and fake in one graph."""
    guided = {"guidance_scale": 3.0, "fake_guidance_scale": 1.5, "fake_train_guidance_scale": 1.5}
    parts = {"sid_alpha": 1.2, "huber_c": 0.1, "exact_divergence": True, "weight": "mean_gap"}
    if kind == "full":
        made = exact(tmp_path, "flow", Laws(), method=name, **guided, **parts)
        made.student.denoiser.network.mean.data += 0.3
        batch = prompts_of(made.teacher.denoiser, ["0.4", "1"])
    else:
        pipeline = tiny_stable_diffusion()
        pipeline.unet.double()
        made = lora(tmp_path, pipeline, method=name, **guided, **parts)
        bare(made.student.denoiser.network).double()
        batch = prompts_of(made.student.denoiser, PROMPTS)
    assert batch.condition is not None
    z, eps = (randn((2, *batch.shape), generators([i, i + 5])).double() for i in (0, 1))
    t, top = torch.tensor([0.3, 0.7]).double(), torch.tensor(made.top).double()
    parameters = list(made.student.parameters.values())
    require_grad(made.roles(), ["student"])
    found = {}
    for split in (True, False):
        object.__setattr__(made.config, "split_gradient", split)
        x0 = made.student.denoiser.x0(made.scale * z, top, batch.condition)
        (losses,) = made.loss("student", batch, Draws(x0, {"student": t}, {"student": eps}), 0)
        found[split] = torch.autograd.grad(losses.total * x0.numel(), parameters, allow_unused=True)

    x0 = made.student.denoiser.x0(made.scale * z, top, batch.condition)
    x_t = made.noise.add(x0, eps, t)
    r = made.teacher.denoiser.guided_x0(x_t, t, batch.condition, 3.0)
    f = made.fake_score.denoiser.guided_x0(x_t, t, batch.condition, 1.5)
    alpha, sigma = made.noise.levels(t, x0)
    total = in_one_graph(name, x0, r, f, sigma / alpha).sum()
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)
    size = max(w.abs().max() for w in wanted if w is not None)
    assert size > 1e-3
    for got in found.values():
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None)
            assert b is None or (a - b).abs().max() < 1e-12 * max(1, size)


class Seen(Experts):
    """Two networks, one for each phase where there are phases; what a discriminator reads is their output."""

    feature_blocks = ("",)


def mixture(folder: Path, **parts: Any) -> DistributionMatching:
    """Parts of the family on two iterations, in which both roles step; the student is no copy of its teacher."""
    own = {
        "method": "dmd2",
        "fake_score_updates": 1,
        "max_train_steps": 2,
        "train_batch_size": 4,
        "guidance_scale": 2.0,
    }
    made = method(folder, Seen(PROCESSES["flow"], [0.7], [0.5]), **(own | parts))
    assert isinstance(made, DistributionMatching)
    with torch.no_grad():
        for network in made.student.denoiser.networks.values():
            network.scale += 0.1
    return made


@pytest.mark.parametrize("policy", get_args(Policy))
def test_the_fake_score_learns_the_samples_that_the_student_makes(policy: str, tmp_path: Path):
    """The same bits whether the student steps in the iteration or not, so the same law: samples, prompts, levels, noises."""
    made = mixture(tmp_path, policy=policy, steps=[4], prompt_dropout=0.3, guidance_scale_max=3.0, max_train_steps=8)
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 4)
    batch.x0 = randn((4, *batch.shape), generators(range(4)))
    require_grad(made.roles(), ["student"])
    samples = []
    for i in range(8):
        alone, both = (
            made.draw(batch, Rngs(0, i, range(4)), i, r) for r in (["fake_score"], ["student", "fake_score"])
        )
        assert (alone.x0.requires_grad, both.x0.requires_grad) == (False, True)
        pairs = [(alone.x0, both.x0.detach())]
        pairs += [(draws["fake_score"] for draws in of) for of in ((alone.t, both.t), (alone.eps, both.eps))]
        pairs += [(d.conditions["fake_score"].tensors["shift"] for d in (alone, both))]
        if policy in Noisy:
            assert alone.point is not None
            assert both.point is not None
            pairs += [(getattr(d.point, k) for d in (alone, both)) for k in ("x", "x0", "start", "to", "s")]
        assert all(torch.equal(a, b) for a, b in pairs)
        samples.append(alone.x0)
    assert all(not torch.equal(a, b) for a, b in combinations(samples, 2))


@pytest.mark.parametrize("gan", ["none", "heads", "mean"])
@pytest.mark.parametrize(("divergence", "policy"), list(product(get_args(Divergence), get_args(Policy))))
def test_parts_mix_or_are_refused(divergence: str, policy: str, gan: str, tmp_path: Path):
    """Two iterations with finite numbers, student and fake score not where they were; or a line of the config's."""
    parts: dict[str, Any] = {"divergence": divergence, "policy": policy}
    if gan != "none":
        parts |= {"gan_weight": 0.1, "discriminator": gan}
    noisy = policy in Noisy and divergence not in ("reverse_kl", "huber_kl")
    if noisy or (policy == "phases" and gan != "none"):
        with pytest.raises(ConfigError, match=r"it takes reverse_kl or huber_kl" if noisy else r"takes no GAN"):
            config(tmp_path, method="dmd2", **parts)
        return
    made = mixture(tmp_path, **parts)
    x0 = randn((4, *made.teacher.denoiser.latent_shape()), generators(range(4)))
    trainer = under_training(tmp_path, made, made.teacher.denoiser, [str(SHIFT)] * 4, x0)
    trained = {name: made.roles()[name].parameters for name in ("student", "fake_score")}
    before = {(n, k): p.detach().clone() for n, of in trained.items() for k, p in of.items()}
    said = [trainer.step(i) for i in range(2)]
    for scalars in said:
        assert torch.tensor(list(scalars.values())).isfinite().all()
        assert ("fake_score/gan" in scalars) is (gan != "none" or divergence in OfRatio)
    assert all(p.isfinite().all() for of in trained.values() for p in of.values())
    moved = {n for (n, k), value in before.items() if not torch.equal(value, trained[n][k])}
    assert moved == {"student", "fake_score"}


COSTS: list[dict[str, Any]] = [
    {"method": "sid"},
    {"method": "sid", "split_gradient": False, "guidance_scale": 1.0, "fake_guidance_scale": 0.0},
    {"method": "sid_fewstep", "steps": [1, 3], "fake_train_guidance_scale": 0.0},
    {"method": "sim", "fake_score_updates": 2},
    {"method": "swiftbrush"},
    {"method": "dmd2", "steps": [1], "guidance_scale": 1.0, "guidance_scale_max": 2.0},
]


@pytest.mark.parametrize("changes", COSTS, ids=lambda c: "-".join(map(str, c.values())))
def test_cost_is_as_declared(changes: dict[str, Any], tmp_path: Path):
    """Rows through the networks in an iteration, divided by the batch: less the rollout's, whose stop is drawn."""
    teacher = Teacher(PROCESSES["vp"], [0.7], [0.5], side=1)
    made = method(tmp_path, teacher, **(changes | {"fake_score_warmup_steps": 1, "train_batch_size": 2}))
    trainer = under_training(tmp_path, made, teacher, [str(SHIFT)] * 4)
    rollout = sum((k - 1) / 2 for k in made.config.steps) / len(made.config.steps)
    for i in range(4):
        with calls(made) as seen:
            trainer.step(i)
        rolled = sum(c.role == "student" for c in seen) - 1
        rows = rows_by_backward(seen, 2)
        declared = made.forwards()[" and ".join(made.updates(i))]
        assert rows[True] == declared["backward"]
        assert rows[False] - rolled == pytest.approx(declared["forward"] - rollout)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["sid", "sim"])
def test_an_implicit_loss_reaches_the_student_alone(name: str, kind: str, tmp_path: Path):
    """Though it goes through the inputs of teacher and fake score: with every parameter open theirs get nothing."""
    if kind == "full":
        made = method(tmp_path, Teacher(PROCESSES["flow"], [0.7, -0.4], [0.5, 1.3]), method=name)
        batch = prompts_of(made.student.denoiser, [str(SHIFT)] * 2)
        made.fake_score.denoiser.network.mean.data += 0.2
        base = dict(made.teacher.denoiser.network.named_parameters())
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), method=name)
        batch = prompts_of(made.student.denoiser, PROMPTS)
        base = {}  # of LoRA roles the base is in the student's own forward, too
    assert isinstance(made, DistributionMatching)
    require_grad(made.roles(), ["student", "fake_score"])
    for p in base.values():
        p.requires_grad_(True)
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    (losses,) = made.loss("student", batch, draws, 0)
    losses.total.backward()
    reached = {n: sum(p.grad is not None for p in r.parameters.values()) for n, r in made.roles().items()}
    assert reached["student"] > 0
    assert reached["fake_score"] == 0
    assert all(p.grad is None for p in base.values())


def test_levels_and_scales_are_drawn_as_said(tmp_path: Path):
    """Logit-normal levels: the median of both roles is sigmoid(mean); a sampled guidance fills its range."""
    made = method(
        tmp_path,
        Teacher(PROCESSES["flow"], [0.0], [1.0], side=1),
        **{"method": "dmd2", "weighting_scheme": "logit_normal", "logit_mean": 0.693, "logit_std": 1.6},
        **{"guidance_scale": 2.0, "guidance_scale_max": 6.0, "min_level": 0.0, "max_level": 1.0, "steps": [1]},
    )
    draws = made.draw(prompts_of(made.teacher.denoiser, [""] * 400), Rngs(0, 0, range(400)), 0, made.updates(0))
    for role in ("student", "fake_score"):
        assert draws.t[role].median().item() == pytest.approx(2 / 3, abs=0.06)  # three deviations of a median of 400
        assert draws.t[role].logit().std().item() == pytest.approx(1.6, abs=0.2)
    assert not torch.equal(draws.t["student"], draws.t["fake_score"])
    assert draws.scale is not None
    assert (draws.scale.min().item(), draws.scale.max().item()) == pytest.approx((2, 6), abs=0.1)


def test_a_sampled_guidance_is_each_rows_own(tmp_path: Path):
    """The direction of a batch is that of its rows, each at its own scale."""
    x = Laws()
    made = exact(tmp_path, "flow", x, method="dmd2", guidance_scale=1.5, guidance_scale_max=3.0)
    batch, x0, t, eps = rows(made, x)
    assert batch.condition is not None
    scale = torch.where(torch.arange(16) % 2 == 0, 1.5, 3.0).double()
    d, *_ = made.direction(x0, t, eps, batch.condition, scale)
    for g, own in ((1.5, slice(0, 16, 2)), (3.0, slice(1, 16, 2))):
        alone, *_ = made.direction(x0[own], t[own], eps[own], batch.condition[own], g)
        assert torch.allclose(d[own], alone, rtol=1e-10)


@pytest.mark.parametrize("name", ["sim", "swiftbrush"])
def test_a_trained_student_has_the_guided_teachers_law(name: str, tmp_path: Path):
    """By Trainer, in two dimensions, the teacher guided 2; within 8% of a deviation, as DMD2's and SiD's."""
    mean, std = torch.tensor([0.7, -0.4]), torch.tensor([0.5, 1.3])
    teacher = Teacher(PROCESSES["flow"], mean.tolist(), std.tolist())
    settings = {
        **{"method": name, "guidance_scale": 2.0, "fake_guidance_scale": 1.0, "huber_c": 0.1, "adam_beta1": 0.0},
        **{"train_batch_size": 8, "max_train_steps": 250, "lr_scheduler": "cosine", "fake_score_warmup_steps": 50},
        **{"learning_rate": 0.02, "fake_score_learning_rate": 0.03, "adam_beta2": 0.95},
        **{"logging_steps": 1000, "checkpointing_steps": 1000, "fake_score_prompt_dropout": 0.0},
    }
    made = method(tmp_path, teacher, **settings)
    under_training(tmp_path, made, teacher, [str(SHIFT)]).run()
    ((found, deviation),) = laws(made, 1, str(SHIFT))
    assert ((found - mean - 2 * SHIFT).abs() / std).max() < 0.08
    assert (deviation / std - 1).abs().max() < 0.08
