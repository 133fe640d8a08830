"""The stock scheduler and call for a plan: the levels that it is meant to have, and what is refused.

That the latents agree is what `stock` itself checks; tests/samplers/test_student.py has whole pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import SamplingPlan, Step, plan_of_levels, uniform_plan
from fewstep.samplers.stock import stock
from tests.pipelines import (
    tiny_classes,
    tiny_ddpm,
    tiny_dit,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl

ZERO_SNR = {"prediction_type": "v_prediction", "zero_terminal_snr": True}


@cache
def denoiser(build: Callable[..., Any], **options: Any) -> Denoiser:
    return denoiser_of(build(**options))


def renoising(*levels: float) -> SamplingPlan:
    return plan_of_levels(levels, rule="consistency")


def schedule(scheduler: Any, arguments: dict[str, Any], bound: dict[str, Any]) -> list[float]:
    """Timesteps that the pipeline goes through."""
    grid = {k: v for k, v in arguments.items() if k in ("num_inference_steps", "timesteps", "sigmas")}
    scheduler.set_timesteps(**{k: v for k, v in (grid | bound).items() if v is not None})
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "build", [tiny_stable_diffusion, tiny_stable_diffusion_xl, tiny_ddpm, tiny_dit, tiny_pixart, tiny_classes]
)
@pytest.mark.parametrize(
    ("plan", "name", "times"),
    [
        (renoising(1, 0.76, 0.5, 0.26), "LCMScheduler", [999, 759, 499, 259]),  # LCM's own grid
        (renoising(1, 0.75, 0.5, 0.25), "LCMScheduler", [999, 749, 499, 249]),  # DMD2's
        (renoising(1, 0.9, 0.333), "LCMScheduler", [999, 899, 332]),
        (uniform_plan(4), "DDIMScheduler", [999, 749, 499, 249]),
        (uniform_plan(4, rule="sde"), "DDIMScheduler", [999, 749, 499, 249]),
    ],
)
def test_variance_preserving_plans(build: Callable[..., Any], plan: SamplingPlan, name: str, times: list[int]):
    scheduler, calls = stock(denoiser(build), {len(plan.steps): plan})
    assert type(scheduler).__name__ == name
    (call,) = calls.values()
    assert schedule(scheduler, call.arguments, call.set_timesteps) == times


def test_levels_between_training_steps_take_euler():
    scheduler, calls = stock(denoiser(tiny_stable_diffusion), {3: uniform_plan(3)})
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert calls[3].arguments == {"timesteps": [999.0, 665.6667, 332.3333], "guidance_scale": 1.0}


def test_one_scheduler_serves_all_counts_by_their_number_alone():
    """LCMScheduler chooses K of the coarsest grid that holds all levels."""
    plans = {k: renoising(*((50 - (i * 50) // k) / 50 for i in range(k))) for k in (1, 2, 4, 8)}
    scheduler, calls = stock(denoiser(tiny_stable_diffusion, **ZERO_SNR), plans)
    assert scheduler.config.original_inference_steps == 50
    assert all(c.arguments == {"num_inference_steps": k, "guidance_scale": 1.0} for k, c in calls.items())
    assert not any(c.preparation() for c in calls.values())


def test_the_schedulers_defaults_are_not_taken_for_the_teachers():
    """A PNDM config (SD 1.5's) says nothing of clipping, DDIM's default is to clip."""
    from diffusers import PNDMScheduler

    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler, _ = stock(denoiser_of(pipeline), {4: uniform_plan(4)})
    assert not scheduler.config.clip_sample
    assert scheduler.config.beta_end == 0.012


def test_flow_plans_keep_their_levels_before_the_shift():
    """SD3 takes `sigmas`; Wan takes no grid and gets it by its scheduler. Neither passes generators on."""
    plan = renoising(1, 0.76, 0.5, 0.26)
    scheduler, calls = stock(denoiser(tiny_stable_diffusion_3), {4: plan})
    assert calls[4].arguments == {"sigmas": [1.0, 0.76, 0.5, 0.26], "guidance_scale": 1.0}
    assert calls[4].preparation() == ["pipe.scheduler.step = partial(pipe.scheduler.step, generator=generators)"]
    wan, wan_calls = stock(denoiser(tiny_wan), {4: plan})
    assert wan_calls[4].arguments == {"num_inference_steps": 4, "guidance_scale": 1.0}
    for s, c in ((scheduler, calls[4]), (wan, wan_calls[4])):  # 3 u / (1 + 2 u)
        assert schedule(s, c.arguments, c.set_timesteps) == pytest.approx([1000, 904.762, 750, 513.158], abs=1e-2)


def test_sana_keeps_the_size_that_is_asked():
    """Its call otherwise takes the nearest size of a list; it passes generators on, and takes `sigmas`."""
    scheduler, calls = stock(denoiser(tiny_sana), {2: renoising(1, 0.4)})
    assert calls[2].arguments == {"sigmas": [1.0, 0.4], "use_resolution_binning": False, "guidance_scale": 1.0}
    assert not calls[2].preparation()
    assert scheduler.config.shift == 3


def guided(*scales: float) -> SamplingPlan:
    ends = [1 - i / len(scales) for i in range(len(scales) + 1)]
    steps = (Step(level=a, to=b, guidance_scale=g) for a, b, g in zip(ends, ends[1:], scales, strict=False))
    return SamplingPlan(steps=tuple(steps))


def test_each_of_two_transformers_has_its_guidance():
    """At shift 3 and boundary .9 only the first of two steps (t = 1, .75) is the first transformer's."""
    teacher = denoiser(tiny_wan, two_transformers=True)
    _, calls = stock(teacher, {2: guided(3, 2), 1: guided(4)})
    assert {k: v for k, v in calls[2].arguments.items() if "guidance" in k} == {
        "guidance_scale": 3,
        "guidance_scale_2": 2,
    }
    assert "guidance_scale_2" not in calls[1].arguments


def test_a_guidance_input_is_the_pipelines_guidance_scale():
    plan = uniform_plan(2, embedded_guidance=7.0, rule="consistency")
    _, calls = stock(denoiser(tiny_stable_diffusion, guidance_input=True), {2: plan})
    assert calls[2].arguments["guidance_scale"] == 7.0


def test_a_scaled_start_is_an_attribute_of_the_scheduler():
    _, calls = stock(denoiser(tiny_stable_diffusion), {2: uniform_plan(2, initial_scale=0.9)})
    assert calls[2].preparation() == ["pipe.scheduler.init_noise_sigma = 0.9"]


TOLD = SamplingPlan(steps=(Step(level=1, to=0, told=0.4),))
OTHER_MEMBER = SamplingPlan(steps=(Step(level=1, to=0.5), Step(level=0.5, to=0, network=1)))


@pytest.mark.parametrize(
    ("build", "options", "plan", "why"),
    [
        (tiny_stable_diffusion, {}, TOLD, "tells the network another time"),
        (tiny_stable_diffusion, {}, OTHER_MEMBER, "changes the student"),
        (tiny_stable_diffusion, {}, uniform_plan(2, rule="tcd", gamma=0.3), "uses rule tcd"),
        (tiny_wan, {}, uniform_plan(2, rule="same_noise"), "uses rule same_noise"),
        (tiny_wan, {}, uniform_plan(2, initial_scale=0.9), "noise scaled by 0.9"),
        (tiny_sana, {}, uniform_plan(2, initial_scale=0.9), "noise scaled by 0.9"),
        (tiny_wan, {}, uniform_plan(2, rule="sde"), "follows rule sde through the levels 1, 0.5$"),
        (tiny_stable_diffusion, {}, plan_of_levels([1, 0.5], end=0.1), "follows rule ode"),
        (
            tiny_stable_diffusion,
            {},
            renoising(1, 2 / 3, 1 / 3),
            "0.666667, 0.333333; levels must be multiples of 1/num",
        ),
        (tiny_stable_diffusion, ZERO_SNR, uniform_plan(3), "0.666667, 0.333333; levels must be multiples of 1/num"),
        (tiny_stable_diffusion, {}, guided(2, 1), "guidance changes from step to step"),
        (tiny_stable_diffusion, {}, guided(0.5, 0.5), "guides only with a guidance_scale above 1"),
        (tiny_wan, {"two_transformers": True}, guided(1, 2), "guides only with a guidance_scale above 1"),
        (tiny_stable_diffusion, {}, uniform_plan(2, embedded_guidance=7.0), "that the student's network does not have"),
        (tiny_stable_diffusion, {"guidance_input": True}, uniform_plan(2), "must be the network's input alone"),
        (
            tiny_dit,
            {},
            renoising(1, 0.5).model_copy(update={"steps": guided(2, 2).steps}),
            "2: DiTPipeline draws noise for",
        ),
        (tiny_dit, {}, uniform_plan(3), "follows rule ode through the levels 1, 0.666667"),
        (tiny_classes, {}, guided(2, 2), "ConsistencyModelPipeline takes none"),
        (tiny_flux, {}, uniform_plan(2, 3.5), "must be the network's input alone"),
        (tiny_flux, {"guidance_input": False}, uniform_plan(2, 3.5), "guides this network by true_cfg_scale only"),
    ],
)
def test_what_plain_diffusers_cannot_do_is_refused(
    build: Callable[..., Any], options: dict[str, Any], plan: SamplingPlan, why: str
):
    with pytest.raises(UserError, match=rf"plan of {len(plan.steps)} steps: .*{why}"):
        stock(denoiser(build, **options), {len(plan.steps): plan})


def test_counts_that_need_different_schedulers_are_refused():
    with pytest.raises(UserError, match="plans of 2, 4 steps: no one stock scheduler follows them all"):
        stock(denoiser(tiny_stable_diffusion), {2: uniform_plan(2), 4: uniform_plan(4, rule="consistency")})
