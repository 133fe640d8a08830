"""Every family against its own stock pipeline, on tiny random networks whose every layer matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, load
from fewstep.samplers.plan import generators, plan_of_scheduler, sample, uniform_plan
from fewstep.samplers.rules import randn
from tests.pipelines import PROMPTS, tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan
from tests.samplers.families import SIZE

SEEDS = [11, 12]
CLIP = {"height": 64, "width": 64, "num_frames": 5}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("scheduler", "spacing"),
    [("DDIM", "leading"), ("DDIM", "trailing"), ("EulerDiscrete", "linspace"), ("EulerDiscrete", "trailing")],
)
def test_stable_diffusion(scheduler: str, spacing: str, prediction_type: str, guidance_scale: float):
    import diffusers

    pipe = tiny_stable_diffusion(prediction_type=prediction_type)
    kind = getattr(diffusers, scheduler + "Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    denoiser = denoiser_of(pipe)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10, guidance_scale)
    theirs = pipe(
        **{"prompt": PROMPTS, "negative_prompt": ["blurry", "blurry"], "num_inference_steps": 10},
        guidance_scale=guidance_scale,
        generator=generators(SEEDS),
        output_type="latent",
    ).images
    close(sample(denoiser, denoiser.encode(PROMPTS, "blurry"), plan, SEEDS), theirs)


def test_stable_diffusion_with_zero_terminal_snr():
    pipe = tiny_stable_diffusion(prediction_type="v_prediction", zero_terminal_snr=True)
    denoiser = denoiser_of(pipe)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10, 3.0)
    assert plan.levels == pytest.approx(uniform_plan(10).levels)
    theirs = pipe(
        PROMPTS, num_inference_steps=10, guidance_scale=3.0, generator=generators(SEEDS), output_type="latent"
    )
    close(sample(denoiser, denoiser.encode(PROMPTS), plan, SEEDS), theirs.images)


def test_stable_diffusion_with_a_guidance_input():
    """Where the UNet has `time_cond_proj_dim`, the stock pipeline embeds the scale and calls once."""
    pipe = tiny_stable_diffusion(guidance_input=True)
    denoiser = denoiser_of(pipe)
    assert denoiser.takes_guidance
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 6).model_copy(update={"embedded_guidance": 4.0})
    theirs = pipe(PROMPTS, num_inference_steps=6, guidance_scale=4.0, generator=generators(SEEDS), output_type="latent")
    ours = sample(denoiser, denoiser.encode(PROMPTS), plan, SEEDS)
    close(ours, theirs.images)
    weaker = sample(denoiser, denoiser.encode(PROMPTS), plan.model_copy(update={"embedded_guidance": 2.0}), SEEDS)
    assert (ours - weaker).norm() > 0.01 * ours.norm()
    theirs = pipe(PROMPTS, num_inference_steps=6, guidance_scale=1.0, generator=generators(SEEDS), output_type="latent")
    untold = plan.model_copy(update={"embedded_guidance": None})
    close(sample(denoiser, denoiser.encode(PROMPTS), untold, SEEDS), theirs.images)


def test_a_guidance_input_is_given_to_a_network_whose_config_knows_none(tmp_path: Path):
    """Stable Diffusion 1.5's has no such key; the new network says what the old one says, whatever it is told."""
    tiny_stable_diffusion(tmp_path)
    path = tmp_path / "unet/config.json"
    config = json.loads(path.read_text())
    del config["time_cond_proj_dim"]
    path.write_text(json.dumps(config))
    denoiser = load(tmp_path)
    widened = denoiser.with_guidance_input()
    assert widened.takes_guidance
    assert not denoiser.takes_guidance
    x, t = randn((1, *denoiser.latent_shape()), generators([0])), torch.tensor(0.6)
    condition = denoiser.encode(PROMPTS[:1])
    with torch.no_grad():
        told = widened.predict(x, t, condition.with_guidance(7.0))
        assert torch.equal(told, denoiser.predict(x, t, condition))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_stable_diffusion_3(dynamic_shift: bool, guidance_scale: float):
    """On the even grid, which the stock pipeline takes as `sigmas`, and on its own default grid."""
    pipe = tiny_stable_diffusion_3(dynamic_shift=dynamic_shift)
    denoiser = denoiser_of(pipe)
    condition = denoiser.encode(PROMPTS, "blurry")
    plan = uniform_plan(10, guidance_scale)
    call = {"prompt": PROMPTS, "negative_prompt": ["blurry"] * 2, "guidance_scale": guidance_scale}
    theirs = pipe(**call, sigmas=list(plan.levels), generator=generators(SEEDS), output_type="latent").images
    close(sample(denoiser, condition, plan, SEEDS), theirs)
    theirs = pipe(**call, num_inference_steps=7, generator=generators(SEEDS), output_type="latent").images
    close(sample(denoiser, condition, plan_of_scheduler(pipe.scheduler, denoiser, 7, guidance_scale), SEEDS), theirs)


def test_stable_diffusion_3_dynamic_shift_follows_the_size():
    """32x32 pixels are 64 tokens, not the 16 of the default size."""
    pipe = tiny_stable_diffusion_3(dynamic_shift=True)
    shape = denoiser_of(pipe).latent_shape(32, 32)
    denoiser = denoiser_of(pipe).at(shape)
    plan = uniform_plan(6)
    call = {"height": 32, "width": 32, "guidance_scale": 1.0, "sigmas": list(plan.levels)}
    theirs = pipe(PROMPTS, **call, generator=generators(SEEDS), output_type="latent").images
    close(sample(denoiser, denoiser.encode(PROMPTS), plan, SEEDS, shape), theirs)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("variant", ["one transformer", "two transformers", "expand_timesteps"])
def test_wan(variant: str, guidance_scale: float):
    """With FlowMatchEuler at the shift of the pipeline's own UniPC; sigma_min = 1/K gives the even grid."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    options = {"two_transformers": "two" in variant, "expand_timesteps": variant == "expand_timesteps"}
    pipe = tiny_wan(**options)
    denoiser = denoiser_of(pipe)  # reads UniPC's config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler.sigma_min = 1 / 8
    theirs = pipe(
        **{"prompt": PROMPTS, "negative_prompt": ["blurry"] * 2, "num_inference_steps": 8, **CLIP},
        guidance_scale=guidance_scale,
        generator=generators(SEEDS),
        output_type="latent",
    ).frames
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 8, guidance_scale)
    assert plan.levels == pytest.approx(uniform_plan(8).levels)
    shape = denoiser.latent_shape(**SIZE)
    close(sample(denoiser, denoiser.encode(PROMPTS, "blurry"), plan, SEEDS, shape), theirs)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_unet2d(prediction_type: str, clip_sample: bool):
    from diffusers import DDIMScheduler

    pipe = tiny_ddpm(prediction_type=prediction_type, clip_sample=clip_sample)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    denoiser = denoiser_of(pipe)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10)
    reached: list[float] = []
    ours = sample(
        denoiser,
        denoiser.encode(["", ""]),
        plan,
        SEEDS,
        callback=lambda _, x0, x: reached.append(x0.abs().max().item()),
    )
    assert (max(reached) == 1) == clip_sample  # the bound is met, and met only where it is set
    theirs = pipe(batch_size=2, num_inference_steps=10, generator=generators(SEEDS), output_type="pt").images
    close(denoiser.decode(ours), theirs)


def test_unet2d_ancestral_is_the_ddpm_pipeline():
    """The pipeline's own scheduler, 20 of its steps."""
    from diffusers import DDPMScheduler

    pipe = tiny_ddpm()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    denoiser = denoiser_of(pipe)
    theirs = pipe(batch_size=2, num_inference_steps=20, generator=generators(SEEDS), output_type="pt").images
    close(denoiser.decode(sample(denoiser, denoiser.encode(["", ""]), uniform_plan(20, rule="sde"), SEEDS)), theirs)


def test_unet2d_refuses_a_learned_variance():
    """Its pipelines hand all channels to schedulers of few steps, which would take them for the noise."""
    with pytest.raises(
        UserError, match="DDPMPipeline: its network predicts 6 channels for 3, a variance beside the noise"
    ):
        denoiser_of(tiny_ddpm(learned_variance=True))


def test_a_unet_may_be_wider_than_tall():
    """A pair as `sample_size`, as the pipeline takes it."""
    pipe = tiny_stable_diffusion()
    pipe.unet.register_to_config(sample_size=(8, 12))
    pipe = type(pipe)(**pipe.components, requires_safety_checker=False)  # which looks at it when it is made
    pipe.set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipe)
    assert denoiser.latent_shape() == (4, 8, 12)
    assert denoiser.latent_shape(height=24) == (4, 12, 12)
    (image,) = pipe("a cat", num_inference_steps=1, output_type="pt").images
    assert tuple(image.shape) == (3, *denoiser.pixels())


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_schedules_of_betas_that_only_one_scheduler_knows(schedule: str):
    from diffusers import DDPMScheduler

    pipe = tiny_ddpm()
    pipe.scheduler = DDPMScheduler(beta_schedule=schedule)
    t = pipe.scheduler.timesteps[::100]
    want = pipe.scheduler.alphas_cumprod[t].sqrt()
    torch.testing.assert_close(denoiser_of(pipe).noise.alpha((t + 1) / 1000).float(), want)


def test_images_are_those_of_the_pipeline():
    """The same call, asked for latents and for images."""
    for build in (tiny_stable_diffusion, tiny_stable_diffusion_3):
        pipe = build()
        denoiser = denoiser_of(pipe)
        call = {"num_inference_steps": 2, "guidance_scale": 1.0}
        latents = pipe(PROMPTS, **call, generator=generators(SEEDS), output_type="latent").images
        images = pipe(PROMPTS, **call, generator=generators(SEEDS), output_type="pt").images
        close(denoiser.decode(latents, batch_size=1), images)
    pipe = tiny_wan()
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, **CLIP}
    latents = pipe(PROMPTS, **call, generator=generators(SEEDS), output_type="latent").frames
    clips = pipe(PROMPTS, **call, generator=generators(SEEDS), output_type="pt").frames
    assert clips.shape == (2, 5, 3, 64, 64)
    close(denoiser_of(pipe).decode(latents), clips)
