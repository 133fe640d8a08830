"""Sampling plans and the loop that follows them, on an exact Gaussian teacher and a tiny pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.noise import Discrete, Flow
from fewstep.samplers.plan import (
    SamplingPlan,
    Step,
    generators,
    plan_of_levels,
    plan_of_scheduler,
    sample,
    uniform_plan,
)
from fewstep.samplers.rules import RULES, randn
from tests.closed_form import GaussianTeacher, processes, vp
from tests.pipelines import PROMPTS, tiny_stable_diffusion


def halved(**rest: Any) -> SamplingPlan:
    return plan_of_levels([1.0, 0.5], **rest)


# plans


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": ()}, "at least 1"),
        ({"rule": "euler"}, "rule 'euler' is unknown; allowed: ode, consistency, tcd, sde, same_noise"),
        ({"steps": (Step(level=0.5, to=0.5),)}, "every step must go down"),
        ({"steps": (Step(level=1, to=0.6), Step(level=0.5, to=0))}, "must start where the one before ended"),
        ({"initial_scale": 0}, "greater than 0"),
        ({"gamma": 1.5}, "less than or equal to 1"),
        ({"sigma": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_bad_plan_says_what_is_wrong(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        SamplingPlan(**({"steps": (Step(level=1, to=0),)} | fields))


def test_a_level_above_1_is_refused():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Step(level=1.1, to=0)


def test_plans_by_hand():
    assert uniform_plan(4).levels == (1, 0.75, 0.5, 0.25)
    assert [s.to for s in plan_of_levels([1, 0.4], end=0.1).steps] == [0.4, 0.1]
    assert uniform_plan(4).nfe == 4
    assert uniform_plan(4, guidance_scale=0.0).nfe == 4
    assert uniform_plan(4, guidance_scale=3.0).nfe == 8
    mixed = (Step(level=1, to=0.5, guidance_scale=5.0), Step(level=0.5, to=0))
    assert SamplingPlan(steps=mixed).nfe == 3


def test_a_plan_survives_json():
    plan = uniform_plan(3, guidance_scale=2.0, rule="tcd", gamma=0.2)
    assert SamplingPlan.model_validate_json(plan.model_dump_json()) == plan


def test_nfe_counts_the_rows_that_are_called(monkeypatch: pytest.MonkeyPatch):
    teacher = GaussianTeacher(Flow())
    rows = []
    call = GaussianTeacher.call

    def counted(self: GaussianTeacher, network: Any, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        rows.append(len(x))
        return call(self, network, x, time, condition)

    monkeypatch.setattr(GaussianTeacher, "call", counted)
    plan = SamplingPlan(
        steps=(
            Step(level=1, to=0.7, guidance_scale=4),
            Step(level=0.7, to=0.3, guidance_scale=0),
            Step(level=0.3, to=0),
        )
    )
    sample(teacher, teacher.encode(["1", "2"]), plan, [0, 1])
    assert rows == [4, 2, 2]
    assert sum(rows) == 2 * plan.nfe


def test_a_scheduler_without_a_plan_is_named():
    class DPMSolverMultistepScheduler:
        pass

    with pytest.raises(UserError, match="DPMSolverMultistepScheduler is no first-order scheduler"):
        plan_of_scheduler(DPMSolverMultistepScheduler(), GaussianTeacher(vp()), 4)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 12), ("linspace", 10)])
def test_a_ddim_grid_with_gaps_is_refused(spacing: str, steps: int):
    """DDIM steps down by 1000 // steps whatever its next timestep is: from 999 to 916, then from 916.67 rounded."""
    from diffusers import DDIMScheduler

    with pytest.raises(UserError, match="trailing with a divisor of 1000"):
        plan_of_scheduler(DDIMScheduler(timestep_spacing=spacing), GaussianTeacher(vp()), steps)


def test_flow_match_default_grid_wastes_its_last_step():
    """Shift 3: sigma_min = 3 / 1002, and of 1, .6677, .3353, .0030 the shift makes 1, .8577, .6021, .0089.

    With sigma_min set to 1/4 it is the even grid: 1, .9, .75, .5.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = GaussianTeacher(Flow(3.0))

    def sigmas() -> list[float]:
        levels = plan_of_scheduler(scheduler, teacher, 4).levels
        return [teacher.noise.shift(torch.tensor(u)).item() for u in levels]

    assert sigmas() == pytest.approx([1, 0.8577, 0.6021, 0.0089], abs=1e-4)
    scheduler.sigma_min = 0.25
    assert sigmas() == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-6)


# sampling


@pytest.mark.parametrize("name", ["vp_v", "flow_shifted", "edm", "trig"])
def test_guided_sampling_of_a_gaussian(name: str):
    """Guidance 3 from shift 0 to shift 0.5 is the exact teacher of shift 1.5: N(0.7 + 1.5, 0.5^2).

    The many-step ODE takes noise z to the end of the exact ODE from x_1 = sigma_1 z (its own start is z itself,
    hence the scale).
    """
    noise = processes()[name]
    teacher = GaussianTeacher(noise, 0.7, 0.5, shape=(2, 3, 3))
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    plan = uniform_plan(400, guidance_scale=3.0, initial_scale=noise.sigma(one).item())
    got = sample(teacher, teacher.encode(["0.5", "0.5"]), plan, [0, 1])
    start = noise.sigma(one) * randn((2, 2, 3, 3), generators([0, 1])).double()
    torch.testing.assert_close(got.double(), teacher.exact_ode(start, one, zero, shift=1.5), rtol=0, atol=0.03)


@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_the_prediction_whatever_the_rule(rule: str):
    teacher = GaussianTeacher(vp("v_prediction"), 0.7, 0.5)
    z = randn((3, 1, 1, 1), generators([0, 1, 2]))
    got = sample(teacher, teacher.encode(["", "1", "2"]), uniform_plan(1, rule=rule), [0, 1, 2])
    expected = teacher.exact_x0(z, torch.tensor(1.0), torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_start_end_and_callback():
    """Initial scale multiplies z; a plan that ends above 0 returns x there; the callback sees each x0 and where it leads."""
    teacher = GaussianTeacher(Flow(), 0.7, 0.5)
    seen: list[tuple[int, Tensor, Tensor]] = []
    plan = plan_of_levels([1.0], end=0.4, initial_scale=2.0)
    got = sample(teacher, teacher.encode([""]), plan, [3], callback=lambda *step: seen.append(step))
    z = 2 * randn((1, 1, 1, 1), generators([3]))
    ((index, x0, x),) = seen
    assert index == 0
    assert torch.equal(x, got)
    assert x0.item() == pytest.approx(0.7, abs=1e-6)  # alpha = 0 at t = 1: the mean
    torch.testing.assert_close(got, 0.6 * x0.float() + 0.4 * z)


def test_the_told_time_reaches_the_network_and_not_the_conversion():
    """Flow, x at t = 1 told 0.6 before a shift of 3, 3 * 0.6 / (1 + 2 * 0.6) = 9 / 11 after it:

    x0 = x - 1 * v(x, 9 / 11) with v = (x - x0(x, 9 / 11)) / (9 / 11).
    """
    teacher = GaussianTeacher(Flow(3.0), 0.7, 0.5)
    z = randn((1, 1, 1, 1), generators([0]))
    got = sample(teacher, teacher.encode([""]), SamplingPlan(steps=(Step(level=1, to=0, told=0.6),)), [0])
    v = (z - teacher.exact_x0(z, torch.tensor(9 / 11))) / (9 / 11)
    torch.testing.assert_close(got, z - v)


def test_members_take_the_steps_that_name_them():
    """Two teachers of means 1 and -2, flow: the last step's denoiser decides where the mean goes."""
    first, second = GaussianTeacher(Flow(), 1.0, 1e-3), GaussianTeacher(Flow(), -2.0, 1e-3)
    steps = (Step(level=1, to=0.5), Step(level=0.5, to=0, network=1))
    seen: list[float] = []
    got = sample(
        first,
        first.encode([""]),
        SamplingPlan(steps=steps),
        [0],
        members=[second],
        callback=lambda _, x0, x: seen.append(x0.item()),
    )
    assert seen == pytest.approx([1, -2], abs=1e-2)
    assert got.item() == pytest.approx(-2, abs=1e-2)


def test_guidance_as_an_input_reaches_the_network():
    """A network whose guidance input is exact: w = 3 at shift 0.5 equals classifier-free guidance of scale 3."""
    teacher = GaussianTeacher(vp("v_prediction"), 0.7, 0.5)
    student = GaussianTeacher(vp("v_prediction"), 0.7, 0.5, guided=1.0)
    condition = teacher.encode(["0.5"])
    got = sample(student, condition, halved(embedded_guidance=3.0), [0])
    torch.testing.assert_close(got, sample(teacher, condition, halved(guidance_scale=3.0), [0]), rtol=1e-4, atol=1e-5)
    assert (got - sample(student, condition, halved(), [0])).abs() > 0.1


def test_a_shifted_flow_samples_the_shifted_levels():
    """Levels of plans are before the shift: 0.5 is t = 0.75 at shift 3."""
    told: list[float] = []
    teacher = GaussianTeacher(Flow(3.0))
    x0 = teacher.x0

    def watched(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        told.append(float(t))
        return x0(x, t, *rest)

    teacher.x0 = watched  # type: ignore[method-assign]
    sample(teacher, teacher.encode([""]), halved(), [0])
    assert told == [1.0, 0.75]


@pytest.fixture
def one_thread():
    """Several threads share a batch out by rows: a row's place then decides how its sums are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["ode", "consistency", "sde", "tcd", "same_noise"])
def test_one_seed_gives_the_same_image_in_any_place(rule: str):
    """Bit for bit at one batch size, on one thread; within rounding at another."""
    denoiser = denoiser_of(tiny_stable_diffusion(prediction_type="v_prediction"))
    prompts, seeds = [*PROMPTS, "a dog"], [7, 8, 9]
    plan = uniform_plan(3, guidance_scale=2.0, rule=rule)
    straight = sample(denoiser, denoiser.encode(prompts), plan, seeds)
    turned = sample(denoiser, denoiser.encode(prompts[::-1]), plan, seeds[::-1])
    assert torch.equal(straight, turned.flip(0))
    alone = sample(denoiser, denoiser.encode(prompts[2:]), plan, seeds[2:])
    torch.testing.assert_close(alone[0], straight[2], rtol=0, atol=1e-4)
    assert not torch.allclose(straight[0], straight[1], atol=0.1)


def test_noise_is_that_of_diffusers_for_a_list_of_generators():
    from diffusers.utils.torch_utils import randn_tensor

    assert torch.equal(randn((2, 4, 8, 8), generators([3, 4])), randn_tensor((2, 4, 8, 8), generators([3, 4])))


@pytest.mark.parametrize("rule", ["ode", "sde"])
def test_clip_sample_bounds_x0_and_keeps_the_noise_of_ddim_but_not_of_ddpm(rule: str):
    """alpha, sigma = 0.6, 0.8 at t = 1 and 0.8, 0.6 at t = 0.5; the network says eps = -1, so x0 is far out.

    DDIM goes on from the clipped x0 with eps = -1 itself, DDPM from the clipped x0 and x.
    """
    noise = Discrete(torch.tensor([0.64, 0.36]), "epsilon", clip_range=1.0)
    teacher = GaussianTeacher(noise)
    teacher.call = lambda network, x, time, condition: torch.full_like(x, -1.0)  # type: ignore[method-assign]
    z = randn((1, 1, 1, 1), generators([0]))
    seen: list[Tensor] = []
    got = sample(
        teacher,
        teacher.encode([""]),
        plan_of_levels([1.0], end=0.5, rule=rule),
        [0],
        callback=lambda _, x0, x: seen.append(x0),
    )
    x0 = ((z + 0.8) / 0.6).clamp(-1, 1)
    assert ((z + 0.8) / 0.6).abs() > 1
    assert seen[0].item() == x0.item()
    if rule == "ode":
        expected = 0.8 * x0 - 0.6
    else:
        mean, std = RULES["sde"](z, x0, torch.tensor(1.0), torch.tensor(0.5), noise)
        again = generators([0])
        randn(z.shape, again)
        expected = mean + std * randn(z.shape, again)
    torch.testing.assert_close(got, expected)
