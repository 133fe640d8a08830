"""Step rules on an exact Gaussian teacher, and against the stock schedulers that state the same laws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.samplers import rules
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.rules import RULES
from tests.closed_form import GaussianTeacher, processes, vp

PROCESSES = {k: processes()[k] for k in ("vp_epsilon", "vp_v_zero_snr", "flow", "edm", "trig")}
every_process = pytest.mark.parametrize("noise", PROCESSES.values(), ids=PROCESSES)
GAMMAS = (0.0, 0.3, 1.0)
EVERY_RULE = {**RULES, **{f"tcd_{g}": partial(rules.tcd, gamma=g) for g in GAMMAS}}


END = 0.1  # not 0: below a table's first entries sigma is no smooth function of t


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linear(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Coefficients of a linear function of two scalars."""
    one, zero = double(1.0)[:, None], double(0.0)[:, None]
    return f(one, zero).item(), f(zero, one).item()


def test_ode_by_hand():
    """Flow, t = 0.8, s = 0.3, x = 2, x0 = 1: eps = (2 - 0.2) / 0.8 = 2.25, x_s = 0.7 + 0.3 * 2.25 = 1.375."""
    mean, std = rules.ode(double(2.0)[:, None], double(1.0)[:, None], double(0.8), double(0.3), PROCESSES["flow"])
    assert (mean.item(), std) == (pytest.approx(1.375, abs=1e-12), 0)


@pytest.mark.parametrize("rule", EVERY_RULE)
@every_process
def test_rules_keep_the_marginal(noise: NoiseProcess, rule: str):
    """For x_t = alpha_t x0 + sigma_t eps with its own x0: x_s = A x0 + B eps + std xi must have A = alpha_s and
    B^2 + std^2 = sigma_s^2.
    """
    t, s = double(0.8), double(0.35)

    def mean(x0: Tensor, eps: Tensor) -> Tensor:
        return EVERY_RULE[rule](noise.add(x0, eps, t), x0, t, s, noise, z=eps)[0]

    a, b = linear(mean)
    zero = double(0.0)[:, None]
    std = torch.as_tensor(EVERY_RULE[rule](zero, zero, t, s, noise, z=zero)[1]).item()
    assert a == pytest.approx(noise.alpha(s).item(), rel=1e-6)
    assert b**2 + std**2 == pytest.approx(noise.sigma(s).item() ** 2, rel=1e-6)


@every_process
def test_ode_is_first_order(noise: NoiseProcess):
    """From t = 1 to END with the exact denoiser of N(0.7, 0.5^2), against the exact ODE: half the step, half the error."""
    teacher = GaussianTeacher(noise, 0.7, 0.5)

    def error(steps: int) -> float:
        start = x = noise.add(double(0.9)[:, None], double(-1.2)[:, None], double(1.0))
        levels = torch.linspace(1, END, steps + 1, dtype=torch.float64)
        for t, s in pairwise(levels):
            x, _ = rules.ode(x, teacher.exact_x0(x, t), t, s, noise)
        return abs((x - teacher.exact_ode(start, levels[0], levels[-1])).item())

    errors = error(100), error(200)
    assert errors[1] > 1e-6
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.06)


@pytest.mark.parametrize("rule", [rules.ode, rules.sde])
@every_process
def test_many_steps_end_in_the_marginal(noise: NoiseProcess, rule: rules.Rule):
    """The law of x through a rule with the exact denoiser of N(0.7, 0.5^2) is Gaussian: the mean moves as a sample
    does, the variance by slope^2 v + std^2. It ends in the marginal's at END, half the error for half the step.
    """
    teacher = GaussianTeacher(noise, 0.7, 0.5)

    def error(steps: int) -> tuple[float, float]:
        alpha, sigma = noise.levels(double(1.0), double(0.0))
        mean, variance = 0.7 * alpha, 0.25 * alpha**2 + sigma**2
        levels = torch.linspace(1, END, steps + 1, dtype=torch.float64)
        for t, s in pairwise(levels):

            def step(x: Tensor, t: Tensor = t, s: Tensor = s) -> tuple[Tensor, Tensor]:
                moved, std = rule(x, teacher.exact_x0(x, t), t, s, noise)
                return moved, torch.as_tensor(std)

            slope = step(mean + 1)[0] - step(mean)[0]
            mean, std = step(mean)
            variance = slope**2 * variance + std**2
        alpha, sigma = noise.levels(double(END), double(0.0))
        return abs((mean - 0.7 * alpha).item()), abs((variance - 0.25 * alpha**2 - sigma**2).item())

    few, many = error(100), error(200)
    assert max(many) < 0.02
    assert many[1] / few[1] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(("gamma", "same"), [(0.0, rules.ode), (1.0, rules.consistency)])
@every_process
def test_tcd_spans_ode_and_consistency(noise: NoiseProcess, gamma: float, same: rules.Rule):
    x, x0 = double(0.3, -1.0)[:, None], double(0.6, 0.2)[:, None]
    t, s = double(0.9, 0.5), double(0.4, 0.1)
    mean, std = rules.tcd(x, x0, t, s, noise, gamma=gamma)
    expected_mean, expected_std = same(x, x0, t, s, noise)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(std, torch.as_tensor(expected_std).to(std).expand_as(std), atol=1e-7, rtol=1e-6)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(n: int = 3) -> tuple[Tensor, Tensor, torch.Generator]:
    """x_t and an output, and the generator of the step's noise."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, 4, 8, 8, generator=g), g


def stepped(rule: rules.Rule, noise: NoiseProcess, x: Tensor, output: Tensor, t: float, s: float) -> Tensor:
    """One step of a rule in float64, with the noise that the generator of `drawn` gives next."""
    x, output = x.double(), output.double()
    mean, std = rule(x, noise.x0(output, x, double(t)), double(t), double(s), noise)
    return mean + std * torch.randn(x.shape, generator=drawn()[2])


def test_sde_is_ddim_with_eta_1_and_the_ddpm_posterior():
    """From index 599 to 399 of 1000, epsilon; DDPM's variance is `fixed_small`."""
    from diffusers import DDIMScheduler, DDPMScheduler

    x, output, _ = drawn()
    ours = stepped(rules.sde, vp(), x, output, 0.6, 0.4)
    ddim = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(5)
    theirs = ddim.step(output, 599, x, eta=1.0, generator=drawn()[2]).prev_sample
    torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=0)
    ddpm = DDPMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    ddpm.set_timesteps(5)
    theirs = ddpm.step(output, 599, x, generator=drawn()[2]).prev_sample
    torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=0)


def test_tcd_is_its_scheduler():
    """From index 999 to 499 of 1000 at gamma 0.3: it jumps to index 349 = 0.7 * 500 - 1, as ours to t = 0.35."""
    from diffusers import TCDScheduler

    scheduler = TCDScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]
    x, output, _ = drawn()
    theirs = scheduler.step(output, 999, x, eta=0.3, generator=drawn()[2]).prev_sample
    ours = stepped(partial(rules.tcd, gamma=0.3), vp(), x, output, 1.0, 0.5)
    torch.testing.assert_close(ours.float(), theirs, atol=1e-4, rtol=0)


def test_consistency_is_the_lcm_scheduler_without_its_boundary_terms():
    """LCM's c_skip, c_out at timestep 999 are 2.5e-9 and 1: alpha_s x0 + sigma_s xi, from index 999 to 499."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]
    x, output, _ = drawn()
    theirs = scheduler.step(output, 999, x, generator=drawn()[2]).prev_sample
    ours = stepped(rules.consistency, vp(), x, output, 1.0, 0.5)
    torch.testing.assert_close(ours.float(), theirs, atol=1e-4, rtol=0)


def test_each_row_draws_from_its_own_generator():
    """And nothing is drawn where the step is deterministic."""
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    mean = torch.zeros(2, 3)
    assert rules.add_noise(mean, 0.0, generators) is mean
    noised = rules.add_noise(mean, torch.tensor(2.0), generators)
    for row, seed in zip(noised, (5, 6), strict=True):
        assert torch.equal(row, 2 * torch.randn(3, generator=torch.Generator().manual_seed(seed)))


def test_same_noise_needs_it():
    x = double(1.0)[:, None]
    with pytest.raises(ValueError, match="first noise z"):
        rules.same_noise(x, x, double(0.5), double(0.2), vp())
