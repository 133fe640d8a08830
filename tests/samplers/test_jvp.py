"""Forward-mode derivatives: of finite differences, of closed forms, and a network left as it was found."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill.networks import Networks
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import Flow, NoiseProcess
from fewstep.samplers.rules import randn
from tests.closed_form import GaussianTeacher, vp
from tests.samplers.families import FAMILIES, inputs

MEAN, STD = 0.7, 1.3


def copied(name: str, dtype: torch.dtype = torch.float32) -> tuple[Denoiser, Tensor, Any]:
    """A family whose networks a test may change, with inputs."""
    denoiser, x, condition = inputs(name)
    networks = {n: copy.deepcopy(m).to(dtype) for n, m in denoiser.networks.items()}
    return denoiser.with_networks(networks), x.to(dtype), condition


def directions(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Random, of both arguments; time is scaled so that neither drowns in the other."""
    generator = torch.Generator().manual_seed(5)
    dx = torch.randn(x.shape, generator=generator).to(x)
    return dx, (0.01 * torch.randn(t.shape, generator=generator)).to(t)


# against finite differences


@contextmanager
def in_double() -> Iterator[None]:
    """What diffusers and this project cast to float32 stays float64, which finite differences need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        yield


LEVELS = [(name, torch.tensor([0.95, 0.4])) for name in FAMILIES]  # on both sides of Wan's boundary
LEVELS.append(("wan", torch.tensor([[0.95, 0.3], [0.5, 0.2]])))  # a time per frame


@pytest.mark.parametrize(("name", "t"), LEVELS)
def test_jvp_equals_central_differences(name: str, t: Tensor):
    """Of fourth order, in float64, along a direction of the sample and of time together."""
    denoiser, x, condition = copied(name, torch.float64)
    t = t.double()
    dx, dt = directions(x, t)

    def at(h: float) -> Tensor:
        return denoiser.predict(x + h * dx, t + h * dt, condition)

    with in_double(), torch.no_grad():
        output, derivative = denoiser.jvp(x, t, condition, dx, dt)
        h = 1e-5 if name == "sana" else 1e-4  # its attention has ReLUs: a shorter step meets no kink of theirs
        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        torch.testing.assert_close(output, at(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(derivative, difference, rtol=0, atol=1e-8 * difference.abs().max().item())
        for part in (denoiser.jvp(x, t, condition, 0 * dx, dt), denoiser.jvp(x, t, condition, dx, 0 * dt)):
            assert part[1].norm() > 0.05 * derivative.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_jvp_in_float32(name: str):
    """Close to float64, under autocast too."""
    denoiser, x, condition = copied(name)
    t = torch.tensor([0.95, 0.4])
    dx, dt = directions(x, t)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, derivative = denoiser.jvp(x, t, condition, dx, dt)
    assert output.dtype == derivative.dtype == torch.float32
    torch.testing.assert_close(output, denoiser.predict(x, t, condition), rtol=1e-4, atol=1e-5)

    exact, x, condition = copied(name, torch.float64)
    with in_double():
        expected = exact.jvp(x, t.double(), condition, dx.double(), dt.double())[1]
    torch.testing.assert_close(derivative.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# against closed forms


def gaussian(noise: NoiseProcess, rows: int) -> tuple[GaussianTeacher, Tensor, Any]:
    """In float64."""
    teacher = GaussianTeacher(noise, MEAN, STD, (1, 2, 2))
    teacher.network.double()
    x = randn((rows, 1, 2, 2), [torch.Generator().manual_seed(i) for i in range(rows)])
    return teacher, x.double(), teacher.encode([""] * rows)


def test_flow_of_a_gaussian_along_its_own_ode():
    """x = (1 - t) m + z sqrt(V), V = (1 - t)^2 S^2 + t^2, z fixed: dv/dt = z d2/dt2 sqrt(V) = z S^2 / V^(3/2)."""
    teacher, x, condition = gaussian(Flow(3.0), 3)
    t = torch.tensor([0.1, 0.5, 1.0]).double()
    with in_double():
        v = teacher.predict(x, t, condition)
        output, derivative = teacher.jvp(x, t, condition, v, torch.tensor(1.0))
    mean, std = teacher.network.mean, teacher.network.log_std.exp()
    variance = ((1 - t) ** 2 * std**2 + t**2).reshape(-1, 1, 1, 1)
    z = (x - (1 - t).reshape(-1, 1, 1, 1) * mean) / variance.sqrt()
    assert output.equal(v)
    torch.testing.assert_close(derivative, z * std**2 / variance**1.5, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_x0_of_a_variance_preserving_gaussian(prediction_type: str, zero_terminal_snr: bool):
    """x0 = m + k (x - alpha m), k = alpha S^2 / V, V = alpha^2 S^2 + sigma^2, and by the product rule

    dx0 = k dx + (k' (x - alpha m) - k alpha' m) dt,  k' = S^2 (alpha' V - alpha V') / V^2.

    Between two levels of diffusers' table rho = sigma / alpha is linear, alpha = (1 + rho^2)^(-1/2); before the last
    level of zero terminal SNR q = 1 / rho is, alpha = q (1 + q^2)^(-1/2).
    """
    from diffusers import DDIMScheduler

    noise = vp(prediction_type, zero_terminal_snr)
    teacher, x, condition = gaussian(noise, 4)
    mean, std = teacher.network.mean.item(), teacher.network.log_std.exp().item()
    t, dt = torch.tensor([0.2503, 0.7005, 0.9996, 1.0]).double(), torch.tensor([1.0, -2.0, 0.5, 1.0]).double()
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).double()
    with in_double():
        output, d_output = teacher.jvp(x, t, condition, dx, dt)
        _, derivative = torch.func.jvp(noise.x0, (output, x, t), (d_output, dx, dt))

    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=zero_terminal_snr)
    levels = scheduler.alphas_cumprod.double().sqrt().tolist()
    for row, (time, rate) in enumerate(zip(t.tolist(), dt.tolist(), strict=True)):
        i = min(int(time * 1000), 999)  # level i sits at (i + 1) / 1000
        left, right, weight = levels[i - 1], levels[i], time * 1000 - i
        left_rho = math.sqrt(1 / left**2 - 1)
        if right == 0:
            q, slope = (1 - weight) / left_rho, -1000 / left_rho
            alpha, d_alpha = q / math.sqrt(1 + q**2), slope * (1 + q**2) ** -1.5
        else:
            slope = 1000 * (math.sqrt(1 / right**2 - 1) - left_rho)
            rho = left_rho + weight * slope / 1000
            alpha, d_alpha = (1 + rho**2) ** -0.5, -rho * slope * (1 + rho**2) ** -1.5
        variance, d_variance = alpha**2 * std**2 + 1 - alpha**2, 2 * alpha * d_alpha * (std**2 - 1)
        k, d_k = alpha * std**2 / variance, std**2 * (d_alpha * variance - alpha * d_variance) / variance**2
        expected = k * dx[row] + (d_k * (x[row] - alpha * mean) - k * d_alpha * mean) * rate
        torch.testing.assert_close(derivative[row], expected, rtol=1e-7, atol=1e-7)


# roles


def test_jvp_is_of_the_adapter_that_is_asked():
    """Whichever was active before; a directional derivative by differences tells them apart."""
    denoiser, x, condition = copied("stable_diffusion")
    made = Networks(denoiser, rank=2)
    roles = {"teacher": made.teacher(), "student": made.trained("student"), "fake_score": made.trained("fake_score")}
    for seed, name in enumerate(("student", "fake_score")):
        generator = torch.Generator().manual_seed(seed)
        for parameter in roles[name].parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    t = torch.tensor([0.9, 0.4])
    dx, dt = directions(x, t)
    found = {}
    with torch.no_grad():
        for name, role in [*roles.items(), *roles.items()]:
            output, derivative = role.denoiser.jvp(x, t, condition, dx, dt)
            torch.testing.assert_close(output, role.denoiser.predict(x, t, condition), rtol=1e-4, atol=1e-5)
            assert derivative.equal(found.setdefault(name, derivative))
    for one, other in (("teacher", "student"), ("teacher", "fake_score"), ("student", "fake_score")):
        assert (found[one] - found[other]).norm() > 0.1 * found[one].norm()
    torch.testing.assert_close(found["teacher"], inputs("stable_diffusion")[0].jvp(x, t, condition, dx, dt)[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_has_the_gradient_of_a_prediction(name: str):
    """Gradient checkpointing, on before, is on again after."""
    denoiser, x, condition = copied(name)
    t = torch.tensor([0.95, 0.4])
    for network in denoiser.networks.values():
        network.requires_grad_().enable_gradient_checkpointing()
    weights = list(denoiser.network.parameters())
    predicted = torch.autograd.grad(denoiser.predict(x, t, condition).square().sum(), weights, allow_unused=True)
    output, derivative = denoiser.jvp(x, t, condition, *directions(x, t))
    found = torch.autograd.grad(output.square().sum(), weights, allow_unused=True)
    largest = max(g.abs().max() for g in predicted if g is not None).item()
    for mine, theirs in zip(found, predicted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6 * largest)
    assert derivative.requires_grad
    assert all(network.is_gradient_checkpointing for network in denoiser.networks.values())


# attention


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_is_left_as_it_was_found(name: str):
    denoiser, x, condition = copied(name)
    t = torch.tensor([0.95, 0.4])

    def state() -> list[Any]:
        modules = [m for network in denoiser.networks.values() for m in network.modules()]
        processors = [p for m in modules if (p := getattr(m, "processor", None)) is not None]
        assert not any(m._forward_pre_hooks for m in modules)
        return [(id(p), getattr(p, "_attention_backend", None)) for p in processors]

    before, output = state(), denoiser.predict(x, t, condition)
    denoiser.jvp(x, t, condition, *directions(x, t))
    assert state() == before
    assert denoiser.predict(x, t, condition).equal(output)


def test_another_attention_backend_is_switched_for_the_call():
    """diffusers' dispatched kernels: here one without a forward-mode derivative."""
    from diffusers.models.attention_dispatch import attention_backend

    denoiser, x, condition = copied("wan")
    t = torch.tensor([0.95, 0.92])
    dx, dt = directions(x, t)
    expected = denoiser.jvp(x, t, condition, dx, dt)
    with attention_backend():  # which the setter changes for other networks, too
        for network in denoiser.networks.values():
            network.set_attention_backend("_native_flash")
    try:
        assert denoiser.jvp(x, t, condition, dx, dt)[1].equal(expected[1])
        backends = {m.processor._attention_backend for m in denoiser.network.modules() if hasattr(m, "processor")}
        assert {backend.value for backend in backends} == {"_native_flash"}
    finally:
        denoiser.network.reset_attention_backend()


def test_an_attention_processor_with_a_kernel_of_its_own_is_refused():
    """Operations from outside torch may lose the derivative without a word."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    denoiser, x, condition = copied("stable_diffusion")
    t = torch.tensor([0.95, 0.4])
    denoiser.network.set_attn_processor(XFormersAttnProcessor())
    with pytest.raises(UserError, match=r"UNet2DConditionModel: XFormersAttnProcessor .* set_default_attn_processor"):
        denoiser.jvp(x, t, condition, *directions(x, t))
    denoiser.network.set_default_attn_processor()
    denoiser.jvp(x, t, condition, *directions(x, t))


def test_weights_below_float32_are_refused():
    denoiser, x, condition = copied("stable_diffusion", torch.bfloat16)
    t = torch.tensor([0.95, 0.4])
    with pytest.raises(UserError, match=r"UNet2DConditionModel: .* torch.bfloat16; load it in float32"):
        denoiser.jvp(x, t, condition, *directions(x, t))


class Twice(torch.autograd.Function):
    """Twice x, differentiable backwards only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * gradient


def test_an_operation_without_a_derivative_is_named():
    """And a mistake of the caller keeps its own words."""
    denoiser, x, condition = copied("stable_diffusion")
    t = torch.tensor([0.95, 0.4])
    dx, dt = directions(x, t)
    with pytest.raises(RuntimeError, match="different size"):
        denoiser.jvp(x, t, condition, dx[:1], dt)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Twice.apply(x)  # type: ignore[return-value]

    denoiser.network.conv_act = Layer()
    with pytest.raises(UserError, match=r"no forward-mode derivative: .*autograd\.Function"):
        denoiser.jvp(x, t, condition, dx, dt)
