"""Noise processes against diffusers' schedulers and against numbers derived here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import EDM, Discrete, Flow, NoiseProcess, TrigFlow, expand
from fewstep.samplers.noise_config import from_config, from_scheduler
from tests.closed_form import processes, vp

PROCESSES = processes()
every_process = pytest.mark.parametrize("noise", PROCESSES.values(), ids=PROCESSES)
T = torch.tensor([0.05, 0.3, 0.7, 0.99], dtype=torch.float64)


def data(rows: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, rows, 3, 2, 2, generator=g).double()
    return x0, eps


# conversions


@pytest.mark.parametrize(
    ("prediction_type", "output"),
    [("epsilon", 3.0), ("sample", 2.0), ("v_prediction", 0.8 * 3 - 0.6 * 2)],
)
def test_conversions_by_hand(prediction_type: str, output: float):
    """alpha, sigma = 0.8, 0.6; x0 = 2, eps = 3: x = 1.6 + 1.8 = 3.4, v = alpha eps - sigma x0 = 1.2."""
    noise = Discrete(torch.tensor([0.64]), prediction_type)
    one = torch.ones(1, 1).double()
    t = torch.ones(1).double()
    assert noise.add(2 * one, 3 * one, t).item() == pytest.approx(3.4, abs=1e-7)
    assert noise.output(2 * one, 3 * one, t).item() == pytest.approx(output, abs=1e-7)
    x = 3.4 * one
    assert noise.x0(output * one, x, t).item() == pytest.approx(2, abs=1e-6)
    assert noise.eps(output * one, x, t).item() == pytest.approx(3, abs=1e-6)
    assert noise.eps_of_x0(2 * one, x, t).item() == pytest.approx(3, abs=1e-6)
    assert noise.score(2 * one, x, t).item() == pytest.approx(-3 / 0.6, abs=1e-5)  # -(x - alpha x0) / sigma^2


def test_flow_conversions_by_hand():
    """t = 0.25, x0 = 2, eps = 3: x = 0.75 * 2 + 0.25 * 3 = 2.25, the network says eps - x0 = 1."""
    noise, one, t = Flow(), torch.ones(1, 1).double(), torch.tensor([0.25], dtype=torch.float64)
    assert noise.add(2 * one, 3 * one, t).item() == 2.25
    assert noise.output(2 * one, 3 * one, t).item() == 1
    assert noise.x0(one, 2.25 * one, t).item() == 2
    assert noise.eps(one, 2.25 * one, t).item() == 3


@every_process
def test_conversions_invert_the_target_at_a_vector_of_times(noise: NoiseProcess):
    x0, eps = data()
    x = noise.add(x0, eps, T)
    output = noise.output(x0, eps, T)
    torch.testing.assert_close(noise.x0(output, x, T), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noise.eps(output, x, T), eps, rtol=1e-6, atol=1e-6)


def test_eps_near_clean_does_not_cancel():
    """From v in float32 at t = 0.001: exact to rounding, where (x - alpha x0) / sigma loses digits."""
    noise = vp("v_prediction")
    x0, eps = (v.float() for v in data(1))
    t = torch.tensor([0.001])
    x, output = noise.add(x0, eps, t), noise.output(x0, eps, t)
    assert (noise.eps(output, x, t) - eps).abs().max() < 2e-6


def test_a_time_per_frame_broadcasts_over_the_frame_dimension():
    """(B, frames) over (B, C, frames, H, W), and (B,) over the same."""
    t = torch.tensor([[0.1, 0.9], [0.5, 0.25]])
    x = torch.ones(2, 3, 2, 4, 4)
    assert (expand(t, x) * x)[0, :, 1].unique().item() == pytest.approx(0.9)
    assert (expand(t, x) * x)[1, :, 0].unique().item() == pytest.approx(0.5)
    assert (expand(t[:, 0], x) * x)[1].unique().item() == pytest.approx(0.5)


def test_an_unknown_prediction_type_names_the_allowed_ones():
    with pytest.raises(UserError, match="'eps' is unknown; allowed: epsilon, sample, v_prediction, flow_prediction"):
        EDM("eps")


# discrete


@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_table_is_that_of_the_scheduler(zero_snr: bool):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
        clip_sample=False,
    )
    noise = from_scheduler(scheduler)
    n = torch.arange(1000)
    t = (n.double() + 1) / 1000
    table = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(noise.alpha(t), table.sqrt(), rtol=0, atol=1e-9)
    torch.testing.assert_close(noise.sigma(t), (1 - table).sqrt(), rtol=0, atol=1e-7)
    torch.testing.assert_close(noise.model_time(t), n.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(noise.from_model_time(n), t, rtol=0, atol=1e-12)
    x0, eps = (v.float() for v in data())
    steps = torch.tensor([0, 300, 750, 999])
    ours = noise.add(x0, eps, (steps + 1) / 1000)
    torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, steps), rtol=0, atol=5e-5)
    target = noise.output(x0, eps, (steps + 1) / 1000)
    torch.testing.assert_close(target, scheduler.get_velocity(x0, eps, steps), rtol=0, atol=5e-5)


def test_discrete_ends():
    """Clean at t = 0; SD keeps alpha = 0.068 at t = 1, zero terminal SNR nothing."""
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for noise in (vp(), vp("v_prediction", zero_terminal_snr=True)):
        assert (noise.alpha(zero).item(), noise.sigma(zero).item()) == (1, 0)
    assert vp().alpha(one).item() == pytest.approx(0.06826, abs=1e-4)
    assert vp("v_prediction", True).alpha(one).item() == 0
    assert vp("v_prediction", True).sigma(one).item() == 1


def test_discrete_interpolates_as_euler_discrete():
    """Fractional timesteps (linspace spacing): sigma / alpha is linear in between."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(7)
    t = vp().from_model_time(scheduler.timesteps)
    assert (scheduler.timesteps % 1 > 0.1).any()
    ratio = vp().sigma(t) / vp().alpha(t)
    torch.testing.assert_close(ratio.float(), scheduler.sigmas[:-1], rtol=2e-6, atol=0)


def test_discrete_before_zero_terminal_snr_alpha_over_sigma_is_linear():
    noise = vp("v_prediction", zero_terminal_snr=True)
    t = torch.tensor([0.999, 0.9995, 1.0], dtype=torch.float64)
    inverse = noise.alpha(t) / noise.sigma(t)
    assert inverse[1].item() == pytest.approx(inverse[0].item() / 2, rel=1e-6)
    assert inverse[2].item() == 0


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match="says nothing at zero terminal SNR"):
        vp("epsilon", zero_terminal_snr=True)


@every_process
def test_levels_fall_and_are_differentiable(noise: NoiseProcess):
    """Autograd of alpha and sigma equals central differences, strictly inside the intervals of a table."""
    t = (T + 0.0004).requires_grad_()
    for level in (noise.alpha, noise.sigma):
        (slope,) = torch.autograd.grad(level(t).sum(), t)
        h = 1e-7
        difference = (level(t.detach() + h) - level(t.detach() - h)) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)
    grid = torch.linspace(0, 1, 257).double()
    snr = noise.alpha(grid) / noise.sigma(grid)
    assert (snr.diff() < 0).all()
    (slope,) = torch.autograd.grad(noise.model_time(t).sum(), t)
    assert (slope > 0).all()


# flow


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_static_shift_is_that_of_the_scheduler(shift: float):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    noise = from_scheduler(scheduler)
    t = noise.shift(torch.tensor([1.0, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(t, scheduler.sigmas[:-1])
    torch.testing.assert_close(noise.model_time(t), scheduler.timesteps)
    torch.testing.assert_close(noise.unshift(t), torch.tensor([1.0, 0.75, 0.5, 0.25]))  # type: ignore[attr-defined]
    if shift == 3:  # 3 * 0.5 / (1 + 2 * 0.5)
        assert t[2].item() == 0.75


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_that_of_the_scheduler(kind: str):
    """1024 tokens between 256 and 4096: mu = 0.5 + 0.65 * 768 / 3840 = 0.63."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=0.63)
    noise = from_scheduler(scheduler, sequence_length=1024)
    torch.testing.assert_close(noise.shift(torch.tensor([1.0, 0.6, 0.2])), scheduler.sigmas[:-1])
    with pytest.raises(UserError, match="pass the number of image tokens"):
        from_scheduler(scheduler)


def test_wan_unipc_is_a_flow_with_its_shift():
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    noise = from_scheduler(scheduler)
    assert isinstance(noise, Flow)
    assert noise.factor == 5.0
    scheduler.set_timesteps(4)
    u = 1 - torch.arange(4).double() * (1 - 1e-3) / 4  # its grid before the shift
    torch.testing.assert_close(noise.shift(u).float(), scheduler.sigmas[:-1], rtol=0, atol=2e-6)


# EDM, TrigFlow, and what a scheduler is read as


def test_edm_levels():
    """Sigma runs from 0 to sigma_max; a quarter of its logarithm is told; alpha is 1."""
    noise = EDM(sigma_max=80.0, rho=7.0)
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert noise.sigma(t).tolist() == pytest.approx([80 * 0.25**7, 80])
    assert noise.alpha(t).tolist() == [1, 1]
    assert noise.model_time(t)[1].item() == pytest.approx(math.log(80) / 4)
    torch.testing.assert_close(noise.from_model_time(noise.model_time(t)), t)


def test_trigflow_is_a_rotation():
    """At angle a: x = cos a x0 + sin a eps, v = dx/da = cos a eps - sin a x0; x0 = cos a x - sin a v."""
    noise = TrigFlow()
    x0, eps = data()
    angle = T * math.pi / 2
    x, v = noise.add(x0, eps, T), noise.output(x0, eps, T)
    a = expand(angle, x0)
    torch.testing.assert_close(v, a.cos() * eps - a.sin() * x0)
    torch.testing.assert_close(noise.x0(v, x, T), a.cos() * x - a.sin() * v)
    torch.testing.assert_close(noise.model_time(T), angle)
    torch.testing.assert_close(noise.from_model_time(angle), T)


def test_from_config_reads_every_kind_and_names_the_unknown():
    from diffusers import DDPMScheduler, EDMEulerScheduler, SCMScheduler

    assert isinstance(from_scheduler(SCMScheduler()), TrigFlow)
    with pytest.raises(UserError, match="scheduler EDMEulerScheduler: it scales the network's inputs and outputs"):
        from_scheduler(EDMEulerScheduler(sigma_max=70.0, rho=6.0))
    assert from_scheduler(DDPMScheduler(clip_sample_range=2.0)).clip_range == 2.0
    assert from_scheduler(DDPMScheduler(clip_sample=False)).clip_range is None
    with pytest.raises(UserError, match="thresholding"):
        from_scheduler(DDPMScheduler(thresholding=True))
    with pytest.raises(UserError, match="scheduler Strange: no noise process known"):
        from_config({"_class_name": "Strange"})


# laws


@every_process
def test_renoise_maps_marginals(noise: NoiseProcess):
    """a alpha_s = alpha_t and a^2 sigma_s^2 + b^2 = sigma_t^2, read off by feeding unit inputs."""
    s, t = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor([0.5, 0.95], dtype=torch.float64)
    one, zero = torch.ones(2, 1).double(), torch.zeros(2, 1).double()
    a, b = noise.renoise(one, zero, s, t), noise.renoise(zero, one, s, t)
    alpha_s, sigma_s = noise.levels(s, one)
    alpha_t, sigma_t = noise.levels(t, one)
    torch.testing.assert_close(a * alpha_s, alpha_t)
    torch.testing.assert_close((a * sigma_s) ** 2 + b**2, sigma_t**2)


@every_process
def test_velocity_is_the_slope_of_the_path(noise: NoiseProcess):
    """d/dt (alpha x0 + sigma eps) by central differences, x0 and eps held; times away from a table's corners."""
    x0, eps = data()
    t = T + 0.0004
    h = 1e-7
    slope = (noise.add(x0, eps, t + h) - noise.add(x0, eps, t - h)) / (2 * h)
    velocity = noise.velocity(x0, noise.add(x0, eps, t), t)
    torch.testing.assert_close(velocity, slope, rtol=1e-4, atol=1e-5)


def test_flow_velocity_is_its_prediction():
    x0, eps = data()
    noise = Flow()
    torch.testing.assert_close(noise.velocity(x0, noise.add(x0, eps, T), T), eps - x0)


@every_process
def test_score_is_the_gradient_of_the_log_density(noise: NoiseProcess):
    """Data N(1, 0.5^2): x_t ~ N(alpha, 0.25 alpha^2 + sigma^2); the score by autograd of its log-density."""
    t = T.clamp(min=0.2)  # EDM's sigma is 6e-8 at 0.05: x - alpha x0 has no digits left there
    x = torch.tensor([[0.3], [-1.0], [2.0], [0.8]]).double().requires_grad_()
    alpha, sigma = noise.levels(t, x)
    variance = 0.25 * alpha**2 + sigma**2
    (expected,) = torch.autograd.grad((-((x - alpha) ** 2) / (2 * variance)).sum(), x)
    x0 = 1 + 0.25 * alpha / variance * (x - alpha)
    torch.testing.assert_close(noise.score(x0, x, t).detach(), expected, rtol=1e-5, atol=1e-8)
