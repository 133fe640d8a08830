"""DMD2 on Gaussian teachers, through Distiller, Trainer and Denoiser: gradients, fixed points, what is trained by what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.distiller import Batch
from fewstep.distill.methods.distribution_matching import DistributionMatching, Draws
from fewstep.distill.objectives.divergence import mean_gap
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.closed_form import vp
from tests.distill.exact import EPS, RATIOS, Laws, Z, assert_relative, at, exact, levels
from tests.distill.exact import SHIFT as PROMPT
from tests.distill.gaussian import PROCESSES, Teacher, calls, laws, lora, method, rows_by_backward, under_training
from tests.pipelines import PROMPTS, tiny_stable_diffusion

MEAN, STD = [0.7, -0.4], [0.5, 1.3]
SHIFT, SCALE = "0.4", 2.0
GUIDED = 0.8  # shift of the guided mean: 0 + 2 (0.4 - 0)
LEVELS = torch.tensor([0.1, 0.35, 0.6, 0.9])


def dmd2(folder: Path, teacher: Teacher, **changes: Any) -> DistributionMatching:
    made = method(folder, teacher, **({"method": "dmd2", "guidance_scale": SCALE, "steps": [1]} | changes))
    assert isinstance(made, DistributionMatching)
    return made


def prompts_of(teacher: Denoiser, prompts: Sequence[str]) -> Batch:
    return Batch(list(prompts), teacher.latent_shape(), teacher.encode(prompts))


def gaussian(made: DistributionMatching, mean: float | Tensor, std: float | Tensor) -> None:
    """Make the fake score the exact one of N(mean, std^2), whatever the prompt."""
    network = made.fake_score.denoiser.network
    with torch.no_grad():
        network.mean.copy_(torch.as_tensor(mean).expand_as(network.mean))
        network.log_std.copy_(torch.as_tensor(std).log().expand_as(network.log_std))
        network.gain.zero_()


def direction(made: DistributionMatching, batch: Batch, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the student's loss does to its sample, times the number of elements: (F - R) / mean|x0 - R|."""
    x0 = x0.detach().clone().requires_grad_(True)
    (losses,) = made.loss("student", batch, Draws(x0, {"student": t}, {"student": eps}), 0)
    (gradient,) = torch.autograd.grad(losses.total, x0)
    return gradient * x0.numel()


# the student's gradient


@pytest.mark.parametrize("name", PROCESSES)
def test_gradient_moments(name: str, tmp_path: Path):
    """Student b + c z with its exact fake score, guided teacher N(mu, S^2), v_T = a^2 S^2 + s^2, v_F with c; float64:

    E[F - R] = (b - mu) s^2 / v_T and E[(F - R) z] = a^2 c s^2 (c^2 - S^2) / (v_F v_T), (s / a)^2 times the derivatives of
    KL(student || teacher) in b and c. The four elements of a sample are z, eps in {1, -1}, exact for quadratics. So is the
    normaliser: x0 - R = A + B z + C eps with A = (b - mu) s^2 / v_T, B = c s^2 / v_T, C = -a S^2 s / v_T, of which the mean
    modulus is (max(|A + B|, |C|) + max(|A - B|, |C|)) / 2, as |u + C| + |u - C| = 2 max(|u|, |C|).
    """
    x = Laws()
    made = exact(tmp_path, name, x, method="dmd2", guidance_scale=SCALE, steps=[1])
    assert made.config.weight == "mean_gap"
    mu = x.m + SCALE * PROMPT
    z, eps = (v.reshape(1, 1, 2, 2).expand(4, 1, 2, 2) for v in (Z, EPS))
    t = at(made.noise, *RATIOS)
    batch = prompts_of(made.teacher.denoiser, [str(PROMPT)] * 4)
    found = direction(made, batch, x.b + x.c * z, t, eps)
    a, s = levels(made)
    v_t, v_f = a**2 * x.S**2 + s**2, a**2 * x.c**2 + s**2
    of_mean, of_z, of_eps = (x.b - mu) * s**2 / v_t, x.c * s**2 / v_t, (a * x.S**2 * s / v_t).abs()
    gap = ((of_mean + of_z).abs().maximum(of_eps) + (of_mean - of_z).abs().maximum(of_eps)) / 2
    assert_relative(found.mean((1, 2, 3)), of_mean / gap)
    wanted = a**2 * x.c * s**2 * (x.c**2 - x.S**2) / (v_f * v_t) / gap
    assert_relative((found * z).mean((1, 2, 3)), wanted)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_guided_teacher_is_a_fixed_point(name: str, tmp_path: Path):
    """At m = mu_c + (g - 1)(mu_c - mu_u) and q = S the two denoisers agree at every x_t: no gradient, whatever w is."""
    teacher = Teacher(PROCESSES[name], MEAN, STD)
    batch = prompts_of(teacher, [SHIFT] * 4)
    x0, eps = (randn((4, 2, 8, 8), generators(range(i, i + 4))) for i in (0, 10))
    t = PROCESSES[name].shift(LEVELS)
    sizes = {}
    for scale in (SCALE, 3.0):
        made = dmd2(tmp_path, teacher, guidance_scale=scale)
        gaussian(made, teacher.mean + GUIDED, teacher.std)
        # per sample, undone: divided by a gap of 1e-3 the rounding of F - R would show
        r = teacher.exact_x0(made.noise.add(x0, eps, t), t, 0.4 * scale)
        sizes[scale] = (direction(made, batch, x0, t, eps) * mean_gap(x0, r)).abs().max().item()
    assert sizes[SCALE] < 1e-5
    assert sizes[3.0] > 1e-2


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_fake_score_that_is_the_teacher_gives_exactly_nothing(kind: str, tmp_path: Path):
    """At guidance 1 and a start where both are copies of one network: F - R is 0, not almost 0."""
    teacher = Teacher(PROCESSES["vp"], MEAN, STD)
    if kind == "full":
        made = dmd2(tmp_path, teacher, guidance_scale=1.0)
        batch = prompts_of(teacher, [SHIFT] * 4)
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), perturbed=False, method="dmd2", guidance_scale=1.0)
        batch = prompts_of(made.student.denoiser, PROMPTS * 2)
    x0, eps = (randn((4, *batch.shape), generators(range(i, i + 4))) for i in (0, 10))
    assert direction(made, batch, x0, LEVELS, eps).abs().max() == 0


# trained


def training(folder: Path, name: str, **changes: Any) -> tuple[Teacher, DistributionMatching]:
    """A student, about to be trained by Trainer."""
    teacher = Teacher(PROCESSES[name], MEAN, STD)
    settings = {
        **{"train_batch_size": 8, "max_train_steps": 200, "fake_score_updates": 1, "lr_scheduler": "cosine"},
        **{"learning_rate": 0.02, "fake_score_learning_rate": 0.03, "adam_beta1": 0.0, "adam_beta2": 0.95},
        **{"logging_steps": 1000, "checkpointing_steps": 1000},
    }
    if name == "edm":  # below 0.6 its sigma is under 0.14, and both denoisers return what they see
        settings |= {"min_level": 0.6, "max_level": 1.0}
    made = dmd2(folder, teacher, **(settings | changes))
    return teacher, made


def is_the_guided_teacher(mean: Tensor, std: Tensor) -> None:
    """Within 8% of a deviation.

    Each of the 200 iterations sees 512 draws a channel, and the cosine's last quarter averages 50 of them: a standard
    error of 1% of S for the fake score, and the student walks beside it. Over four seeds of all processes the largest
    errors were 4% (means) and 6% (deviations). Guidance of 1 or 3 would move the means by 80% and 31% of S.
    """
    wanted = torch.tensor(MEAN) + GUIDED
    assert ((mean - wanted).abs() / torch.tensor(STD)).max() < 0.08
    assert (std / torch.tensor(STD) - 1).abs().max() < 0.08


@pytest.mark.parametrize("name", ["vp", "vp_v_zero_snr", "flow_shifted", "edm"])
def test_a_trained_one_step_student_has_the_guided_teachers_law(name: str, tmp_path: Path):
    """In two dimensions, from the teacher's own posterior mean of noise, whose deviation is far too small."""
    # an error of epsilon at t = 1 is multiplied by 14.6, one of EDM's scale by 5
    rate = {"vp": 0.002, "edm": 0.004}.get(name, 0.02)
    teacher, made = training(tmp_path, name, steps=[1], learning_rate=rate)
    ((_, before),) = laws(made, 1, SHIFT)
    assert (before < 0.35 * torch.tensor(STD)).all()
    under_training(tmp_path, made, teacher, [SHIFT]).run()
    is_the_guided_teacher(*laws(made, 1, SHIFT)[0])


@pytest.mark.parametrize("name", ["vp", "vp_v_zero_snr", "flow_shifted", "edm"])
def test_a_trained_four_step_student_has_the_guided_teachers_law(name: str, tmp_path: Path):
    """The student m + q/v (x_t - alpha m) has two numbers a channel; at m = mu, q = S each step keeps mean and deviation.

    Four free steps would be too many for this test: a Gaussian fake score sees no more of their outputs than the mean
    and the variance of all together. Those are compared; of one step alone they differ where the first step starts from
    N(0, I) and not from N(alpha m, v^2) (Stable Diffusion by 0.068 m S, this EDM by m S / 5).
    """
    teacher, made = training(tmp_path, name, steps=[4])
    network = made.student.denoiser.network
    network.jump = True
    made.student.parameters = {f"network.{k}": getattr(network, k) for k in ("mean", "log_std")}
    with torch.no_grad():
        network.mean -= 0.3
        network.log_std -= 0.5
    under_training(tmp_path, made, teacher, [SHIFT]).run()
    means, stds = (torch.stack(v) for v in zip(*laws(made, 4, SHIFT), strict=True))
    variance = (stds**2 + means**2).mean(0) - means.mean(0) ** 2
    is_the_guided_teacher(means.mean(0), variance.sqrt())


@pytest.mark.parametrize("name", ["vp", "vp_v_zero_snr", "flow_shifted", "edm"])
def test_the_fake_score_becomes_the_students_own(name: str, tmp_path: Path):
    """A student that stands still at N(m, q^2), a warm-up of the fake score alone: of all Gaussian scores it finds that.

    Within 6% of q: 1% is the error of 512 draws a channel averaged over the cosine's last 50 of 200 iterations, and
    low levels say little. It starts at the teacher, 1.2 q and 67% away.
    """
    teacher, made = training(tmp_path, name, fake_score_warmup_steps=200)
    network, fake = made.student.denoiser.network, made.fake_score.denoiser.network
    network.jump = True
    with torch.no_grad():
        network.mean += 0.6 * teacher.std * 0.6 * 2 - float(SHIFT)
        network.log_std += torch.tensor(0.6).log()
    made.fake_score.parameters = {f"network.{k}": getattr(fake, k) for k in ("mean", "log_std")}
    student = {k: p.detach().clone() for k, p in made.student.parameters.items()}
    under_training(tmp_path, made, teacher, [SHIFT]).run()
    assert all(torch.equal(student[k], p) for k, p in made.student.parameters.items())
    ((mean, std),) = laws(made, 1, SHIFT)  # what the fake score has seen
    assert ((fake.mean.flatten() + float(SHIFT) - mean).abs() / std).max() < 0.06
    assert (fake.log_std.exp().flatten() / std - 1).abs().max() < 0.06


# cost


@pytest.mark.parametrize(("scale", "kind"), [(SCALE, "full"), (1.0, "full"), (4.0, "lora")])
def test_cost_is_as_declared(scale: float, kind: str, tmp_path: Path):
    """Rows through the networks in an iteration of the trainer, divided by the batch, for every count and stop.

    The declared cost is the expectation: counts 1 and 3 equally likely, so that the stop at step 1 has weight
    1/2 + 1/6, those at steps 2 and 3 have 1/6 each.
    """
    changes = {"guidance_scale": scale, "steps": [1, 3], "fake_score_updates": 2, "train_batch_size": 2}
    teacher = Teacher(PROCESSES["flow"], MEAN, STD, side=1)
    made = (
        dmd2(tmp_path, teacher, **changes)
        if kind == "full"
        else lora(tmp_path, tiny_stable_diffusion(), method="dmd2", **changes)
    )
    prompts = [SHIFT] * 4 if kind == "full" else PROMPTS * 2
    trainer = under_training(tmp_path, made, made.student.denoiser, prompts)
    costs: dict[str, dict[int, tuple[float, float]]] = {"student and fake_score": {}, "fake_score": {}}
    for i in range(60):  # the seed is fixed: every stop comes up in each kind of iteration
        with calls(made) as seen:
            trainer.step(i)
        rows = rows_by_backward(seen, 2)
        stop = sum(c.role == "student" for c in seen)
        costs[" and ".join(made.updates(i))][stop] = rows[False], rows[True]
        if all(by_stop.keys() == {1, 2, 3} for by_stop in costs.values()):
            break
    assert [by_stop.keys() for by_stop in costs.values()] == [{1, 2, 3}] * 2
    weight = {1: 2 / 3, 2: 1 / 6, 3: 1 / 6}
    for turn, declared in made.forwards().items():
        forward, backward = (sum(weight[s] * c[part] for s, c in costs[turn].items()) for part in (0, 1))
        assert (declared["forward"], declared["backward"]) == pytest.approx((forward, backward))
    teachers = 1 if scale == 1 else 2
    assert made.forwards()["student and fake_score"] == {"forward": pytest.approx(0.5 + 1 + teachers), "backward": 2}


# sampling


def test_the_plan(tmp_path: Path):
    """Even levels by the consistency rule, for trained counts only; SDXL's authors: 999, 749, 499, 249."""
    made = dmd2(tmp_path, Teacher(vp(), [0.0], [1.0]), steps=[4, 1])
    assert made.step_counts == (1, 4)
    plan = made.plan(4)
    times = made.noise.model_time(torch.tensor(plan.levels, dtype=torch.float64))
    assert times.tolist() == pytest.approx([999, 749, 499, 249])
    assert (plan.rule, plan.nfe, plan.initial_scale) == ("consistency", 4, 1)
    with pytest.raises(UserError, match="steps 2: this student was trained for 1, 4 steps"):
        made.plan(2)
