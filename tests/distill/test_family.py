"""Presets of the distribution matching family beside each other: they differ, cost what they say, reach what they should."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.networks import require_grad
from fewstep.distill.presets import PRESETS
from fewstep.distill.random import Rngs
from tests.distill.exact import SHIFT, Laws, exact, on_the_sample, prompts_of, rows
from tests.distill.gaussian import PROCESSES, Teacher, calls, laws, lora, method, rows_by_backward, under_training
from tests.pipelines import PROMPTS, tiny_stable_diffusion

ONE = {"guidance_scale": 2.0}  # guidances of the fake score stay the preset's


def direction(folder: Path, **changes: Any) -> Tensor:
    """At one state: a student, a fake score and a teacher that are all different, and a discriminator of x_t."""
    x = Laws()
    made = exact(folder, "vp", x, **({"gan_warmup_steps": 0, "train_data": "in memory"} | changes))
    if made.discriminator is not None:
        made.discriminator = lambda x_t, t, condition: x_t.flatten(1)  # type: ignore[assignment]
    with torch.no_grad():
        made.fake_score.denoiser.network.mean += 0.2
        made.fake_score.denoiser.network.gain.fill_(0.4)
    return on_the_sample(made, *rows(made, x))


def test_presets_differ(tmp_path: Path):
    """Of any two the directions are not even parallel. Phased DMD's is DMD2's, at other points (test_phased_dmd.py), and
    DMD's too, beside its regression (test_regression.py).
    """
    found = {name: direction(tmp_path, method=name, **ONE) for name in PRESETS if name not in ("dmd", "phased_dmd")}
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
        ({"method": "tdm", "huber_c": 1.0e5}, {"method": "dmd2"}, 1.0e5),
    ],
)
def test_identities(one: dict, other: dict, factor: float, tmp_path: Path):
    a, b = direction(tmp_path, **(ONE | one)), direction(tmp_path, **(ONE | other))
    assert torch.allclose(factor * a, b, rtol=1e-9, atol=1e-14)
    assert b.abs().max() > 1e-3


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
