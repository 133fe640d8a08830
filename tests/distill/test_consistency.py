"""Consistency distillation: residuals and fixed points on Gaussian teachers, through Distiller, Trainer and Denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.distiller import Batch
from fewstep.distill.methods.consistency import Consistency, Draws
from fewstep.distill.random import Rngs
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import generators, sample
from fewstep.samplers.rules import randn
from tests.closed_form import vp
from tests.distill.gaussian import PROCESSES, Teacher, calls, lora, method, rows_by_backward, under_training
from tests.pipelines import PROMPTS, tiny_stable_diffusion

MEAN, STD = [0.7, -0.4], [0.5, 1.3]
SHIFT, SCALE = "0.4", 2.0
GUIDED = 0.8  # shift of the guided mean: 0 + 2 (0.4 - 0)


def lcm(folder: Path, teacher: Teacher, **changes: Any) -> Consistency:
    made = method(folder, teacher, **({"method": "lcm", "guidance_scale": SCALE, "steps": [1]} | changes))
    assert isinstance(made, Consistency)
    return made


def jumping(made: Consistency, shift: float) -> None:
    """Make student and target the exact ODE map of the teacher whose mean is moved by `shift`, whatever the prompt."""
    for role in (made.student, made.target):
        network = role.denoiser.network
        network.jump = True
        with torch.no_grad():
            network.mean += shift
            network.gain.zero_()


def batch_of(teacher: Denoiser, prompts: list[str]) -> Batch:
    shape = teacher.latent_shape()
    x0 = 0.7 + randn((len(prompts), *shape), generators(range(len(prompts))))
    return Batch(prompts, shape, teacher.encode(prompts), x0)


def loss(made: Consistency, batch: Batch, draws: Draws) -> Tensor:
    (losses,) = made.loss("student", batch, draws, 0)
    return losses.total


# the residual of the exact map


@pytest.mark.parametrize("name", PROCESSES)
def test_the_residual_of_the_exact_map_falls_with_the_square_of_the_gap(name: str, tmp_path: Path):
    """One solver step errs by O(gap^2), and the exact map takes both ends to one place: half the gap, a quarter of it.

    Guidance is folded in: the exact map is that of the teacher of the guided mean. With the map of the unguided one
    the residual is that of two means, O(gap).
    """
    teacher = Teacher(PROCESSES[name], MEAN, STD)
    batch = batch_of(teacher, [SHIFT] * 3)
    u = torch.tensor([0.5, 0.7, 0.9]).double()
    eps = randn(batch.x0.shape, generators([7, 8, 9]))  # type: ignore[union-attr]
    found = {}
    for shift in (GUIDED, 0.4):
        made = lcm(tmp_path, teacher, huber_c=1e-9)  # the mean of |p - q|
        jumping(made, shift)
        for n in (40, 80):
            t, s = (made.noise.shift(v).float() for v in (u, u - 1 / n))
            found[shift, n] = loss(made, batch, Draws(t, s, eps, SCALE)).item()
    assert found[GUIDED, 40] / found[GUIDED, 80] == pytest.approx(4, rel=0.05)
    assert found[0.4, 40] / found[0.4, 80] == pytest.approx(2, rel=0.1)
    assert found[0.4, 80] > 10 * found[GUIDED, 80]


@pytest.mark.parametrize("name", ["vp", "flow_shifted"])
def test_with_embedded_guidance_student_and_target_are_told_each_rows_scale(name: str, tmp_path: Path):
    """A scale for each row: the exact map of shift w 0.4 has a residual of O(gap^2) only if told the same w twice."""
    teacher = Teacher(PROCESSES[name], MEAN, STD)
    made = lcm(tmp_path, teacher, guidance_scale=1.5, guidance_scale_max=6.0, huber_c=1e-9, num_ode_steps=40)
    assert not teacher.takes_guidance
    jumping(made, 0.0)
    for role in (made.student, made.target):
        with torch.no_grad():
            role.denoiser.network.gain.fill_(1)
            role.denoiser.network.guided.fill_(1)
    batch = batch_of(teacher, [SHIFT] * 6)
    draws = made.draw(batch, Rngs(0, 0, range(6)), 0, ["student"])
    assert isinstance(draws.scale, Tensor)
    assert ((draws.scale >= 1.5) & (draws.scale <= 6)).all()
    assert draws.scale.unique().numel() == 6
    u = torch.linspace(0.5, 0.9, 6).double()
    found = {}
    for n in (40, 80):
        draws.t, draws.s = (made.noise.shift(v).float() for v in (u, u - 1 / n))
        found[n] = loss(made, batch, draws).item()
    assert found[40] / found[80] == pytest.approx(4, rel=0.05)
    # a target that is told another scale is a mistake as large as the difference of the means
    with torch.no_grad():
        made.target.denoiser.network.guided.zero_()
    assert loss(made, batch, draws).item() > 100 * found[80]


# the boundary


@pytest.mark.parametrize("name", PROCESSES)
def test_at_the_lowest_level_the_target_is_the_teacher_alone(name: str, tmp_path: Path):
    """j = 1: f(x, 0) = x, so q is the guided teacher's x0 whatever the target network says; the gradient is of p alone."""
    teacher = Teacher(PROCESSES[name], MEAN, STD)
    made = lcm(tmp_path, teacher, huber_c=0.5, target_ema_decay=0.0)
    assert made.target is made.student
    batch = batch_of(teacher, [SHIFT] * 4)
    assert batch.x0 is not None
    t = made.noise.shift(torch.full((4,), 1 / 50, dtype=torch.float64)).float()
    eps = randn(batch.x0.shape, generators(range(4)))
    made.student.denoiser.network.requires_grad_(True)
    with torch.no_grad():
        for table in ("scale", "offset"):
            getattr(made.student.denoiser.network, table).add_(0.3)
    with calls(made) as seen:
        total = loss(made, batch, Draws(t, torch.zeros(4), eps, SCALE))
    assert [c.graph for c in seen] == [False, False, True]
    x_t = made.noise.add(batch.x0, eps, t)
    with torch.no_grad():
        q = teacher.exact_x0(x_t, t, GUIDED)
    p = made.student.denoiser.x0(x_t, t, batch.condition)  # type: ignore[arg-type]
    expected = (((p - q) ** 2 + 0.25).sqrt() - 0.5).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)
    table = made.student.denoiser.network.offset
    (found,), (wanted,) = (torch.autograd.grad(value, table) for value in (total, expected))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-7)


def test_draws_are_neighbours_of_the_grid(tmp_path: Path):
    """Every j of 1..N, s one below t, before a flow's shift; the lowest s is exactly 0 and the highest t exactly 1."""
    teacher = Teacher(PROCESSES["flow_shifted"], [0.0], [1.0], side=1)
    made = lcm(tmp_path, teacher, num_ode_steps=5)
    batch = batch_of(teacher, [""] * 100)
    draws = made.draw(batch, Rngs(0, 0, range(100)), 0, ["student"])
    unshifted = [made.noise.unshift(v.double()) * 5 for v in (draws.t, draws.s)]  # type: ignore[attr-defined]
    assert unshifted[0].round().unique().tolist() == [1, 2, 3, 4, 5]
    assert torch.allclose(unshifted[0] - unshifted[1], torch.ones(100).double(), atol=1e-5)
    assert draws.s.min() == 0
    assert draws.t.max() == 1


# roles


def test_the_target_is_a_moving_average_of_the_student(tmp_path: Path):
    """After each step target <- 0.8 target + 0.2 student, from the same start."""
    teacher = Teacher(vp("v_prediction"), MEAN, STD)
    made = lcm(tmp_path, teacher, target_ema_decay=0.8, learning_rate=0.05)
    trainer = under_training(tmp_path, made, teacher, [SHIFT] * 4)
    for i in range(3):
        before = {k: p.detach().clone() for k, p in made.target.parameters.items()}
        trainer.step(i)
        for key, value in before.items():
            expected = 0.8 * value + 0.2 * made.student.parameters[key]
            assert torch.allclose(made.target.parameters[key], expected, atol=1e-6)
    assert (made.student.parameters["network.mean"] - made.target.parameters["network.mean"]).abs().max() > 0.01
    assert all(p.grad is None for p in made.target.parameters.values())


def test_a_lora_student_is_its_own_target(tmp_path: Path):
    """No copy: adapter off, on without graph, on with graph; cost as declared, rows divided by the batch."""
    made = lora(tmp_path, tiny_stable_diffusion(), method="lcm", guidance_scale=4.0)
    assert list(made.roles()) == ["teacher", "student"]
    batch = batch_of(made.student.denoiser, PROMPTS)
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student"])
    for p in made.student.parameters.values():
        p.requires_grad_(True)
    with calls(made) as seen:
        loss(made, batch, draws).backward()
    assert [(c.role, c.rows, c.graph) for c in seen] == [
        ("teacher", 4, False),
        ("student", 2, False),
        ("student", 2, True),
    ]
    assert all(p.grad is not None for p in made.student.parameters.values())
    base = dict(made.teacher.denoiser.network.module.named_parameters())
    assert not any(p.grad is not None for k, p in base.items() if ".lora_" not in k)


def test_batched_guidance_equals_two_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """4 x0_c - 3 x0_u, said with two calls of B rows, gives the same loss and gradient."""
    made = lora(tmp_path, tiny_stable_diffusion(), method="lcm", guidance_scale=4.0)
    batch = batch_of(made.student.denoiser, PROMPTS)
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student"])
    parameter = next(p for k, p in made.student.parameters.items() if "lora_B" in k)
    parameter.requires_grad_(True)
    batched = loss(made, batch, draws)

    def two_calls(self: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, scale: float) -> Tensor:
        unconditional = self.x0(x_t, t, condition.unconditional())
        return unconditional + scale * (self.x0(x_t, t, condition) - unconditional)

    monkeypatch.setattr(Denoiser, "guided_x0", two_calls)
    with calls(made) as seen:
        single = loss(made, batch, draws)
    assert [c.rows for c in seen] == [2, 2, 2, 2]
    assert batched.item() == pytest.approx(single.item(), rel=1e-4)
    one, two = (torch.autograd.grad(v, parameter)[0] for v in (batched, single))
    assert (one - two).norm() < 1e-3 * two.norm()


def test_a_lora_cannot_take_a_guidance_input(tmp_path: Path):
    with pytest.raises(UserError, match="train a full student, not a LoRA"):
        lora(tmp_path, tiny_stable_diffusion(), method="lcm", guidance_scale_max=8.0)


# cost


@pytest.mark.parametrize(
    ("changes", "forward"), [({}, 3), ({"guidance_scale": 1.0}, 2), ({"guidance_scale_max": 4.0}, 3)]
)
def test_cost_is_as_declared(changes: dict[str, float], forward: float, tmp_path: Path):
    """Rows through the networks in an iteration of the trainer, divided by the batch."""
    teacher = Teacher(PROCESSES["flow"], MEAN, STD)
    made = lcm(tmp_path, teacher, **changes)
    trainer = under_training(tmp_path, made, teacher, [SHIFT] * 4)
    with calls(made) as seen:
        trainer.step(0)
    rows = rows_by_backward(seen, 4)
    assert made.forwards() == {"student": {"forward": rows[False], "backward": rows[True]}}
    assert rows == {False: forward, True: 1}


# sampling


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_plan_is_lcm_schedulers_own(steps: int, tmp_path: Path):
    from diffusers import LCMScheduler

    teacher = Teacher(vp(), MEAN, STD)
    made = lcm(tmp_path, teacher, steps=[1, 2, 4, 8])
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps, original_inference_steps=50)
    plan = made.plan(steps)
    times = teacher.noise.model_time(torch.tensor(plan.levels, dtype=torch.float64))
    assert times.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-6)
    assert plan.rule == "consistency"
    assert plan.nfe == steps
    with pytest.raises(UserError, match="steps 3: this student is sampled in 1, 2, 4, 8 steps"):
        made.plan(3)


@pytest.mark.parametrize("name", PROCESSES)
def test_sampling_starts_where_training_had_its_noise(name: str, tmp_path: Path):
    """The exact map started from the plan's own noise, c z: EDM's c is sigma_max, and not 1.

    The map m + S/v (x - alpha m) takes N(0, c^2) to mean m - alpha m S / v and deviation c S / v, v^2 = alpha^2 S^2 +
    sigma^2: what is missing of m and S is Stable Diffusion's start from N(0, I) at alpha = 0.068.
    """
    teacher = Teacher(PROCESSES[name], MEAN, STD, side=64)
    made = lcm(tmp_path, teacher)
    jumping(made, GUIDED)
    found = sample(made.student.denoiser, teacher.encode([SHIFT] * 8), made.plan(1), range(8))
    one, std = torch.ones(()), teacher.std.flatten()
    alpha, sigma = teacher.noise.alpha(one), teacher.noise.sigma(one)
    wanted, v = teacher.mean.flatten() + GUIDED, (alpha**2 * std**2 + sigma**2).sqrt()
    start = 5 if name == "edm" else 1
    # 32,768 draws: standard errors of S / 181 and S / 256
    assert ((found.mean((0, 2, 3)) - (wanted - alpha * wanted * std / v)).abs() < std / 30).all()
    assert found.std((0, 2, 3)).tolist() == pytest.approx((start * std / v).tolist(), rel=0.02)
