"""The exact teacher of the closed-form tests is exact, and is a Denoiser like any other."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill.networks import Networks
from fewstep.samplers.noise import Flow, NoiseProcess
from tests.closed_form import GaussianTeacher, processes, vp

PROCESSES = processes()
every_process = pytest.mark.parametrize("noise", PROCESSES.values(), ids=PROCESSES)
T = torch.tensor([0.3, 0.6, 0.9])


@every_process
def test_the_posterior_mean_is_that_of_bayes(noise: NoiseProcess):
    """E[x0 | x_t] by quadrature over x0 of N(0.7, 0.5^2) times the likelihood N(x_t; alpha x0, sigma^2)."""
    teacher = GaussianTeacher(noise, 0.7, 0.5)
    x = torch.tensor([[0.2], [-0.4], [1.5]], dtype=torch.float64)
    t = T.double()
    grid = torch.linspace(-5, 6, 200001, dtype=torch.float64)
    alpha, sigma = noise.levels(t, x)
    log_density = -((grid - 0.7) ** 2) / 0.5 - (x - alpha * grid) ** 2 / (2 * sigma**2)
    expected = (log_density.softmax(dim=1) * grid).sum(1, keepdim=True)
    torch.testing.assert_close(teacher.exact_x0(x, t), expected, rtol=1e-5, atol=1e-5)


@every_process
def test_the_network_says_it_in_every_prediction_type(noise: NoiseProcess):
    """At a vector of times, with a mean per channel and a shift per row; guidance 3 from 0 to 0.5 is shift 1.5."""
    mean, std = torch.tensor([0.7, -1.0]).reshape(2, 1, 1), torch.tensor([0.5, 2.0]).reshape(2, 1, 1)
    teacher = GaussianTeacher(noise, mean, std, shape=(2, 2, 2))
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    condition = teacher.encode(["0.5", "0.5", "0.5"])
    torch.testing.assert_close(teacher.x0(x, T, condition), teacher.exact_x0(x, T, 0.5), rtol=1e-3, atol=1e-4)
    guided = teacher.guided_x0(x, T, condition, 3.0)
    torch.testing.assert_close(guided, teacher.exact_x0(x, T, 1.5), rtol=1e-3, atol=1e-3)


@every_process
def test_exact_ode_follows_the_velocity(noise: NoiseProcess):
    """d x / dt by central differences equals the process's velocity with the exact x0."""
    teacher = GaussianTeacher(noise, 0.7, 0.5)
    x = torch.tensor([[0.2], [-0.4], [1.5]], dtype=torch.float64)
    t, h = T.double() + 0.0004, 1e-6
    slope = (teacher.exact_ode(x, t, t + h) - teacher.exact_ode(x, t, t - h)) / (2 * h)
    velocity = noise.velocity(teacher.exact_x0(x, t), x, t)
    torch.testing.assert_close(slope, velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.exact_ode(x, t, t), x)


def test_copies_train_apart_to_any_affine_map():
    """A student of 2 knots, flow: its one-step map z -> x0 becomes 0.5 z + 0.7 by least squares, the level 0.5 stays
    the teacher's, and so does the teacher.
    """
    networks = Networks(GaussianTeacher(Flow(), 0.7, 0.5, knots=2), kind="full")
    teacher, student = networks.teacher().denoiser, networks.trained("student")
    parameters = {k: p.requires_grad_() for k, p in student.parameters.items() if k.endswith(("scale", "offset"))}
    assert set(parameters) == {"network.scale", "network.offset"}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3)
    z = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)  # mean 0, variance 1
    condition = teacher.encode(["", ""])
    for _ in range(60):
        optimizer.zero_grad()
        (student.denoiser.x0(z, torch.tensor(1.0), condition) - (0.5 * z + 0.7)).square().mean().backward()
        optimizer.step()
    x0 = student.denoiser.x0(z, torch.tensor(1.0), condition)
    torch.testing.assert_close(x0, 0.5 * z + 0.7, rtol=1e-4, atol=1e-4)
    half = torch.tensor(0.5)
    torch.testing.assert_close(student.denoiser.x0(z, half, condition), teacher.x0(z, half, condition))
    assert teacher.x0(z, torch.tensor(1.0), condition).flatten().tolist() == pytest.approx([0.7, 0.7])


def test_a_student_with_a_guidance_input_starts_as_the_teacher():
    """It ignores the scale until trained; at `guided` = 1 it is the guided teacher."""
    networks = Networks(GaussianTeacher(vp("v_prediction"), 0.7, 0.5), kind="full")
    teacher, student = networks.teacher().denoiser, networks.trained("student", guidance_input=True).denoiser
    assert student.takes_guidance
    assert not teacher.takes_guidance
    x = torch.tensor([0.3, -1.0]).reshape(2, 1, 1, 1)
    t, condition = torch.tensor([0.9, 0.4]), teacher.encode(["0.5", "-0.2"])
    asked = condition.with_guidance(3.0)
    torch.testing.assert_close(student.x0(x, t, asked), teacher.x0(x, t, condition))
    student.network.guided.data.fill_(1)
    torch.testing.assert_close(student.x0(x, t, asked), teacher.guided_x0(x, t, condition, 3.0))
