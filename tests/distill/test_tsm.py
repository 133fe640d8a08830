"""Teacher score matching: its weight, its gradient against the data's, what it converges to, and the way to a small student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Batch, Distiller
from fewstep.distill.methods.pretrain import Draws
from fewstep.distill.methods.tsm import TeacherScoreMatching
from fewstep.distill.networks import Networks
from fewstep.distill.random import Rngs
from fewstep.distill.run import methods_distiller, train
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import EDM, Flow
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.closed_form import GaussianTeacher, posterior, processes
from tests.distill.gaussian import PROCESSES, Teacher, calls, under_training
from tests.distill.runs import config

LEVELS = torch.tensor([0.02, 0.2, 0.5, 0.7, 0.9, 1.0])


def tsm(folder: Path, teacher: Teacher, student: Teacher | None = None, **changes: Any) -> Any:
    """The method over full networks, the student's another Gaussian's."""
    settings = config(folder, **{"method": "tsm", "student": "full", **changes})
    return methods_distiller(settings, Networks(teacher, "full", student=student))


def loss(made: Distiller, x0: Tensor, eps: Tensor, t: Tensor, shift: str = "0") -> Tensor:
    condition = made.roles()["student"].denoiser.encode([shift] * len(x0))
    batch = Batch([""] * len(x0), tuple(x0.shape[1:]), condition, x0)
    (losses,) = made.loss("student", batch, Draws(t, eps, condition), 0)
    return losses.total


# the weight


@pytest.mark.parametrize("name", processes())
def test_the_weight_is_said_of_x0(name: str, tmp_path: Path):
    """Mean min(w, 5) |x0 - x0_teacher|^2: w = SNR of epsilon, SNR + 1 of v, 1 / t^2 of a flow, 1 of x0.

    Without a limit it is the plain error of the network's own output.
    """
    teacher = GaussianTeacher(processes()[name], mean=0.7, std=0.5, shape=(2, 4, 4))
    made = tsm(tmp_path, teacher)  # type: ignore[arg-type]
    student, noise = made.student.denoiser, made.noise
    with torch.no_grad():
        student.network.scale += 0.3
        student.network.offset -= 0.2
    x0, eps = (randn((6, 2, 4, 4), generators(range(i, i + 6))) for i in (0, 6))
    x_t, told = noise.add(x0, eps, LEVELS), student.encode(["0"] * 6)
    snr = (noise.alpha(LEVELS) / noise.sigma(LEVELS)) ** 2
    w = {"epsilon": snr, "sample": 1 + 0 * snr, "v_prediction": snr + 1, "flow_prediction": LEVELS**-2}
    error = (student.x0(x_t, LEVELS, told) - teacher.x0(x_t, LEVELS, told)).square().mean((1, 2, 3))
    wanted = (w[noise.prediction_type].clamp(max=5) * error).mean()
    assert loss(made, x0, eps, LEVELS).item() == pytest.approx(wanted.item(), rel=1e-4)
    plain = tsm(tmp_path, teacher, weight_limit=None)  # type: ignore[arg-type]
    plain.student = made.student
    outputs = student.predict(x_t, LEVELS, told) - teacher.predict(x_t, LEVELS, told)
    assert loss(plain, x0, eps, LEVELS).item() == pytest.approx(outputs.square().mean().item(), rel=1e-5)


# the gradient


@pytest.mark.parametrize("name", PROCESSES)
def test_an_exact_teacher_gives_the_mean_gradient_of_the_data(name: str, tmp_path: Path):
    """E of the gradient on data N(m, S^2) is the same for both targets; TSM's differs less from sample to sample.

    x0 = m +- S and eps = +-1 make every mean of a quadratic exact; in float64. The teacher itself is at 0, whereas the
    data's own loss stays at w sigma^2 S^2 / (alpha^2 S^2 + sigma^2), what x_t leaves open.
    """
    m, s = 0.7, 0.5
    teacher, other = (Teacher(PROCESSES[name], [mean], [std], side=1) for mean, std in ((m, s), (0.2, 0.9)))
    for each in (teacher, other):
        each.network.double()
    with torch.no_grad():
        teacher.network.mean.fill_(m)
        teacher.network.log_std.copy_(torch.tensor(s).double().log())
    made = tsm(tmp_path, teacher, other, weight_limit=None)
    data: Any = methods_distiller(config(tmp_path, method="pretrain", student="full"), Networks(other, "full"))
    for each in (made, data):
        each.roles()["student"].denoiser.network.double()  # copies are trained in float32
    x0, eps = ((a * v).reshape(4, 1, 1, 1) for a, v in zip((s, 1.0), signs(), strict=True))
    x0 = m + x0
    for level in (0.6, 0.75, 0.9):
        t = made.noise.shift(torch.tensor(level).double()).expand(4)
        rows = {each: [gradient(each, x0[[i]], eps[[i]], t[[i]]) for i in range(4)] for each in (made, data)}
        mean, wanted = (torch.stack(rows[each]).mean(0) for each in (made, data))
        assert wanted.norm() > 1e-3
        assert torch.allclose(mean, wanted, rtol=1e-9, atol=1e-11)
        spread, noisy = (torch.stack(rows[each]).std(0).norm() for each in (made, data))
        assert spread < 0.9 * noisy
    exact = tsm(tmp_path, teacher, weight_limit=None)
    exact.student.denoiser.network.double()
    with torch.no_grad():
        exact.student.denoiser.network.load_state_dict(teacher.network.state_dict())
    assert loss(exact, x0, eps, t) == 0
    data.student = exact.student
    alpha, sigma = (float(f(t[0])) for f in (data.noise.alpha, data.noise.sigma))
    snr = (alpha / sigma) ** 2
    w = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1, "flow_prediction": sigma**-2}[data.noise.prediction_type]
    wanted = w * sigma**2 * s**2 / (alpha**2 * s**2 + sigma**2)
    assert loss(data, x0, eps, t).item() == pytest.approx(wanted, rel=1e-9)


def signs() -> Tensor:
    """Means of both, of their squares and of their product are exact."""
    return torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]]).double()


def gradient(made: Distiller, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Of the corrections that a student must learn."""
    network = made.roles()["student"].denoiser.network
    weights = [network.scale, network.offset]
    for p in weights:
        p.requires_grad_(True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(made, x0, eps, t), weights)])


@pytest.mark.parametrize("name", ["vp", "vp_v_zero_snr", "flow_shifted", "edm"])
def test_what_the_teacher_says_is_learnt_not_what_the_data_is(name: str, tmp_path: Path):
    """By Trainer, from N(0, 1), on data N(-1, 0.3^2) that the teacher does not know: its posterior mean, its errors included.

    Within 5% of the teacher's deviation; a network that learnt the data would be off by more than all of it.
    """
    teacher, other = Teacher(PROCESSES[name], [1.2], [0.5]), Teacher(PROCESSES[name], [0.0], [1.0])
    settings = {
        **{"train_batch_size": 16, "max_train_steps": 400, "learning_rate": 0.03, "lr_scheduler": "cosine"},
        **{"adam_beta2": 0.99, "logging_steps": 1000, "checkpointing_steps": 1000, "prompt_dropout": 0.0},
    }
    made = tsm(tmp_path, teacher, other, **settings)
    x0 = -1 + 0.3 * randn((64, 1, 8, 8), generators(range(64)))
    under_training(tmp_path, made, teacher, [""] * 64, x0).run()
    student = made.roles()["student"].denoiser
    t = student.noise.shift(torch.tensor([0.3, 0.6, 0.9]))
    alpha, sigma = student.noise.levels(t, torch.zeros(3, 1, 1, 1))
    for z in (-1.0, 1.0):  # of the inputs that it met
        x_t = (-alpha + z * (alpha**2 * 0.3**2 + sigma**2).sqrt()).expand(3, 1, 8, 8)
        with torch.no_grad():
            found = student.x0(x_t, t, student.encode([""] * 3))
        assert ((found - teacher.exact_x0(x_t, t)).abs() / 0.5).max() < 0.05
        data, _ = posterior(student.noise, x_t, t, torch.tensor(-1.0), torch.tensor(0.3))
        assert ((data - teacher.exact_x0(x_t, t)).abs() / 0.5).max() > 1


# what each network is told, and cost


def test_both_are_asked_the_same_once(tmp_path: Path):
    """The same input, the same prompt or none; the teacher without a graph."""
    made = tsm(tmp_path, Teacher(Flow(), [0.0], [1.0]), prompt_dropout=0.4)
    teacher, n = made.teacher.denoiser, 24
    batch = Batch(["1"] * n, (1, 8, 8), teacher.encode(["1"] * n, "-3"), torch.zeros(n, 1, 8, 8))
    rng = Rngs(0, 0, range(n))
    draws = made.draw(batch, rng, 0, ["student"])
    dropped = rng.uniform("dropout") < 0.4
    assert 4 < dropped.sum() < 16  # 9.6 expected, a deviation of 2.4
    assert torch.equal(draws.condition.tensors["shift"], torch.where(dropped, -3.0, 1.0))
    for p in made.student.parameters.values():
        p.requires_grad_(True)
    with calls(made) as seen:
        list(made.loss("student", batch, draws, 0))
    assert [(c.role, c.rows / n, c.graph) for c in seen] == [("teacher", 1, False), ("student", 1, True)]
    assert torch.equal(seen[0].x_t, seen[1].x_t)
    assert made.forwards() == {"student": {"forward": 1, "backward": 1}}
    # the shift moves both outputs alike: where a prompt were dropped for one of them alone, they would differ
    with torch.no_grad():
        assert next(iter(made.loss("student", batch, draws, 0))).total == 0


def test_the_plan_is_the_guided_ode(tmp_path: Path):
    made = tsm(tmp_path, Teacher(EDM(sigma_max=5.0), [0.0], [1.0]), step_counts=[20], validation_guidance_scale=3.0)
    plan = made.plan(20)
    assert (plan.rule, plan.initial_scale, len(plan.steps), plan.nfe) == ("ode", 5, 20, 40)
    with pytest.raises(UserError, match="steps 50"):
        made.plan(50)


def test_what_makes_no_sense_is_refused(tmp_path: Path):
    teacher = Teacher(Flow(), [0.0], [1.0])
    with pytest.raises(UserError, match="is no LoRA: set student: full"):
        TeacherScoreMatching(config(tmp_path, method="tsm", student="lora"), Networks(teacher, "lora"))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="config: student_config: missing; method tsm trains a network of another size"
    ):
        train(config(tmp_path, method="tsm", teacher="embedded:emoji"))
