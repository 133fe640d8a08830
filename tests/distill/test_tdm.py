"""TDM: where steps end, whose turn a step is, what a trained student becomes, and what runs in plain diffusers.

What is learnt from points that keep noise, and their gradient: `test_noisy_points.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import ConfigError
from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.networks import require_grad
from fewstep.distill.random import Rngs
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import sample
from fewstep.samplers.stock import stock
from tests.distill.exact import SHIFT, prompts_of
from tests.distill.gaussian import PROCESSES, Teacher, affine, calls, is_as_declared, lora, method, under_training
from tests.distill.runs import config
from tests.distill.test_backward_simulation import Sequential
from tests.pipelines import PROMPTS, tiny_ddpm, tiny_pixart, tiny_stable_diffusion, tiny_stable_diffusion_3

MEAN, STD = [0.7, -0.4], [0.5, 1.3]


# the trajectory


def exact_steps(made: DistributionMatching, teacher: Teacher, shift: float) -> None:
    """Make the student at level i / K what keeps the teacher's marginals: x_s = alpha_s mu + (v_s / v)(x - alpha mu).

    By the corrections of its output, affine in x_t. With x0 = (x_s - (sigma_s / sigma) x) / (alpha_s - sigma_s alpha / sigma)
    that is k = (v_s / v - sigma_s / sigma) / (alpha_s - sigma_s alpha / sigma); at first v and alpha mu are those of
    sampling's own start.
    """
    noise, network, plan = made.noise, made.student.denoiser.network, made.plan(made.config.steps[0])
    mu, std = teacher.mean + shift, teacher.std
    for i, step in enumerate(plan.steps):
        t, s = (noise.shift(torch.tensor(v)) for v in (step.level, step.to))
        alpha, sigma, alpha_s, sigma_s = noise.alpha(t), noise.sigma(t), noise.alpha(s), noise.sigma(s)
        v, v_s = ((a**2 * std**2 + b**2).sqrt() for a, b in ((alpha, sigma), (alpha_s, sigma_s)))
        v, middle = (torch.full_like(v, plan.initial_scale), 0 * mu) if i == 0 else (v, alpha * mu)
        x = torch.stack([torch.zeros(1, 1, 1), torch.ones(1, 1, 1)]).expand(2, *mu.shape)
        x_s = alpha_s * mu + v_s / v * (x - middle)
        x0 = (x_s - sigma_s / sigma * x) / (alpha_s - sigma_s * alpha / sigma)
        wanted = noise.output(x0, noise.eps_of_x0(x0, x, t), t)
        with torch.no_grad():
            off = wanted - network(x, noise.model_time(t).expand(2), torch.full((2,), shift))
            place = round(float(t) * (len(network.scale) - 1))
            network.scale[place] += off[1] - off[0]
            network.offset[place] += off[0]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["vp", "vp_v_zero_snr", "flow", "edm"])
def test_the_fixed_point(name: str, steps: int, tmp_path: Path):
    """Steps with the gain k end exactly at alpha_s mu + v_s z: there, with the teacher's own score, nothing pulls.

    Both are functions of the start's z; of the guided teacher 2, whose mean is 0.7 + 2 SHIFT.
    """
    teacher = Teacher(PROCESSES[name], MEAN, STD, side=2, knots=steps)
    made = method(tmp_path, teacher, method="tdm", steps=[steps], guidance_scale=2.0, level_margin=0.0)
    exact_steps(made, teacher, 2 * SHIFT)
    batch, rng = prompts_of(teacher, [str(SHIFT)] * 40), Rngs(0, 0, range(40))
    # the corrections were made at a shift of 2 SHIFT of the mean
    batch.condition = teacher.encode([str(2 * SHIFT)] * 40)
    draws = made.draw(batch, rng, 0, ["student", "fake_score"])
    z = rng.normal("start", batch.shape)
    at = draws.point
    assert at is not None
    alpha, sigma = made.noise.levels(at.s, z)
    mu, v = teacher.mean + 2 * SHIFT, (alpha**2 * teacher.std**2 + sigma**2).sqrt()
    assert torch.allclose(at.x, alpha * mu + v * z, rtol=1e-3, atol=2e-3)
    assert set(at.to.tolist()) == {i / steps for i in range(steps)}
    network = made.fake_score.denoiser.network
    batch.condition = teacher.encode([str(SHIFT)] * 40)
    sizes = {}
    for off in (0.0, 0.3):
        with torch.no_grad():
            network.mean.copy_(teacher.mean + 2 * SHIFT + off)
            network.gain.zero_()
        assert batch.condition is not None
        t, eps = draws.t["student"], draws.eps["student"]
        object.__setattr__(made.config, "weight", "none")
        object.__setattr__(made.config, "divergence", "reverse_kl")
        d, *_ = made.direction(at.x0, t, eps, batch.condition, 2.0, None, at)
        sizes[off] = d.abs().max().item()
    assert sizes[0.0] < 1e-4
    assert sizes[0.3] > 1e-3


@pytest.mark.parametrize("name", [*PROCESSES, "ddpm"])
def test_the_trajectory_is_the_students_own_sampling(name: str, tmp_path: Path):
    """From the noise that sampling starts from, x0 at every step is `plan.sample`'s; `ddpm` clips it between steps."""
    if name == "ddpm":
        made, prompts = lora(tmp_path, tiny_ddpm(clip_sample=True), method="tdm", steps=[3]), ["", ""]
    else:
        made = method(tmp_path, Teacher(PROCESSES[name], MEAN, STD, side=2), method="tdm", steps=[3])
        prompts = [str(SHIFT), "1"]
        with torch.no_grad():  # a student that is not its teacher
            made.student.denoiser.network.scale += 0.05
    student, seeds = made.student.denoiser, [3, 4]
    batch = prompts_of(student, prompts)
    assert batch.condition is not None
    seen: list[Tensor] = []
    last = sample(student, batch.condition, made.plan(3), seeds, callback=lambda i, x0, x: seen.append(x0.float()))
    clip, steps = made.noise.clip_range, set()
    for i in range(6):
        rng = Sequential(seeds, 0)
        rng.iteration = i  # other steps
        at = made.draw(batch, rng, i, ["student", "fake_score"][i % 2 :]).point
        assert at is not None
        for row in range(2):
            step = [round(s.level, 3) for s in made.plan(3).steps].index(round(at.start[row].item(), 3))
            x0 = at.x0[row] if clip is None else at.x0[row].clamp(-clip, clip)
            assert torch.allclose(x0, seen[step][row], rtol=1e-3, atol=1e-3)
            if step == 2:
                assert torch.allclose(at.x[row], last[row], rtol=1e-3, atol=1e-3)
            steps.add(step)
    assert steps == {0, 1, 2}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_graph_and_the_declared_cost(kind: str, tmp_path: Path):
    """K - 1 calls of the student to where its rows stand, one more, with a graph if it steps; teacher guided and fake score
    without, the fake score's own with.
    """
    changes = {"method": "tdm", "steps": [3], "fake_score_updates": 2, "train_batch_size": 2}
    if kind == "full":
        teacher = Teacher(PROCESSES["flow"], MEAN, STD, side=1)
        made = method(tmp_path, teacher, **changes)
        trainer = under_training(tmp_path, made, teacher, [str(SHIFT)] * 4)
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), **changes)
        trainer = under_training(tmp_path, made, made.student.denoiser, PROMPTS * 2)
    for i in range(4):
        with calls(made) as seen:
            trainer.step(i)
        both = i % 2 == 0
        assert made.updates(i) == (["student", "fake_score"] if both else ["fake_score"])
        student = [c.graph for c in seen if c.role == "student"]
        assert student == [False] * 2 + [both]
        is_as_declared(made, i, seen)
    assert made.forwards()["student and fake_score"] == {"forward": 2 + 2 + 1, "backward": 2}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_loss_reaches_its_own_role_alone(kind: str, tmp_path: Path):
    """And the student through the one call alone: not through the trajectory, nor through the point that is compared."""
    if kind == "full":
        made = method(tmp_path, Teacher(PROCESSES["flow"], MEAN, STD), method="tdm")
        batch = prompts_of(made.student.denoiser, [str(SHIFT)] * 2)
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), method="tdm")
        batch = prompts_of(made.student.denoiser, PROMPTS)
    require_grad(made.roles(), ["student", "fake_score"])
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    assert draws.x0.requires_grad
    assert draws.point is not None
    assert not draws.point.x.requires_grad
    assert not draws.point.x0.requires_grad
    for role in ("student", "fake_score"):
        (losses,) = made.loss(role, batch, draws, 0)
        losses.total.backward()
        reached = {n: sum(p.grad is not None for p in r.parameters.values()) for n, r in made.roles().items()}
        assert {n for n, count in reached.items() if count} == {role}
        for p in made.roles()[role].parameters.values():
            p.grad = None


@pytest.mark.parametrize(("margin", "least"), [(0.05, 0.02), (0.0, 0.1)])
def test_levels_are_those_of_the_rows_own_step(margin: float, least: float, tmp_path: Path):
    """Student: from the margin above where the step ends up to its start, none below `min_level`; fake score: all of the step.

    Steps uniform.
    """
    teacher = Teacher(PROCESSES["flow_shifted"], [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="tdm", level_margin=margin, min_level=least)
    draws = made.draw(prompts_of(teacher, [""] * 400), Rngs(0, 0, range(400)), 0, ["student", "fake_score"])
    at = draws.point
    assert at is not None
    counts = (4 * at.to).round().long().bincount(minlength=4)
    assert (counts - 100).abs().max() < 35  # four deviations
    assert torch.allclose(at.start - at.to, torch.tensor(0.25))
    places = []
    for role, low, top in (("student", (at.to + margin).clamp(min=least), 0.98), ("fake_score", at.to, 1.0)):
        u = made.noise.unshift(draws.t[role])
        high = at.start.clamp(max=top)
        share = (u - low) / (high - low)
        assert share.min().item() == pytest.approx(0, abs=0.02)
        assert share.max().item() == pytest.approx(1, abs=0.02)
        assert (draws.t[role] > at.s).all()
        places.append(share)
    assert abs(torch.corrcoef(torch.stack(places))[0, 1]) < 0.2


# trained


@pytest.mark.parametrize("name", ["flow", "vp_v_zero_snr"])
def test_every_step_of_a_trained_student_ends_in_the_guided_teachers_law(name: str, tmp_path: Path):
    """By Trainer, two channels, two steps, guided 2: mean and deviation within 10% of a deviation at 0.5 and at 0.

    The start is the teacher's posterior mean, whose end is far too narrow.
    """
    teacher = Teacher(PROCESSES[name], MEAN, STD, knots=2)
    settings = {
        **{"method": "tdm", "steps": [2], "guidance_scale": 2.0, "huber_c": 0.1, "train_batch_size": 8},
        **{"max_train_steps": 300, "lr_scheduler": "cosine", "learning_rate": 0.02, "fake_score_learning_rate": 0.03},
        **{"logging_steps": 1000, "checkpointing_steps": 1000},
    }
    made = method(tmp_path, teacher, **settings)

    def ends() -> list[Tensor]:
        """Relative errors of mean and deviation where each step ends, exactly: affine steps keep the law Gaussian."""
        mean, std, found = torch.zeros(2).double(), torch.ones(2).double(), []
        for step in made.plan(2).steps:
            gain, offset = affine(made.student.denoiser, step.level, str(SHIFT))
            t, s = (made.noise.shift(torch.tensor(v).double()) for v in (step.level, step.to))
            alpha, sigma, alpha_s, sigma_s = (f(v) for v in (t, s) for f in (made.noise.alpha, made.noise.sigma))
            kept = sigma_s / sigma
            mean, std = (
                (alpha_s - kept * alpha) * (gain * mean + offset) + kept * mean,
                ((alpha_s - kept * alpha) * gain + kept) * std,
            )
            mu = torch.tensor(MEAN) + 2 * SHIFT
            v = (alpha_s**2 * torch.tensor(STD) ** 2 + sigma_s**2).sqrt()
            found.append(torch.stack([(mean - alpha_s * mu) / v, std / v - 1]).abs().max())
        return found

    assert ends()[-1] > 0.5
    under_training(tmp_path, made, teacher, [str(SHIFT)]).run()
    assert max(ends()) < 0.1


# what runs, and what does not


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": [1, 4], "level_margin": 0.24}, "no level is left to compare scores in step 1 of 4, from 1 to 0.75"),
        ({"divergence": "sid"}, "it takes reverse_kl or huber_kl"),
        ({"policy": "phases", "gan_weight": 1e-3, "train_data": "x"}, "policy phases takes no GAN"),
        ({"steps": [4], "max_level": 0.7}, "no level is left to compare scores in step 1 of 4"),
        ({"min_level": 0.3}, "in step 4 of 4, from 0.25 to 0"),
        ({"policy": "backward_simulation", "fake_score_target": "x0_hat"}, "x0_hat: of policy trajectory, now back"),
    ],
)
def test_refused(changes: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **({"method": "tdm"} | changes))


@pytest.mark.parametrize(
    ("pipeline", "top", "scheduler", "grid"),
    [
        (tiny_stable_diffusion, 0.9, "EulerDiscreteScheduler", {"timesteps": [899, 674, 449, 224]}),
        (tiny_pixart, 0.9, "EulerDiscreteScheduler", {"timesteps": [899, 674, 449, 224]}),
        (tiny_stable_diffusion_3, None, "FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    ],
)
def test_the_plan_in_plain_diffusers(pipeline: Any, top: float | None, scheduler: str, grid: dict, tmp_path: Path):
    """TDM's published times, from N(0, I) at index 899, in a stock scheduler that steps as the plan does."""
    teacher = denoiser_of(pipeline())
    made = lora(tmp_path, teacher.pipeline, method="tdm", init_level=top)
    plan = made.plan(4)
    assert (plan.rule, plan.initial_scale, plan.nfe) == ("ode", 1, 4)
    found, by_steps = stock(made.student.denoiser, {4: plan})
    assert type(found).__name__ == scheduler
    assert grid.items() <= by_steps[4].arguments.items()
