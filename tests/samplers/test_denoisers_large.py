"""SDXL, Flux and Sana against their own stock pipelines, and what each network is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.samplers.baseline import counted
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.noise import Flow
from fewstep.samplers.plan import SamplingPlan, Step, generators, plan_of_scheduler, sample, uniform_plan
from tests.pipelines import PROMPTS
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl
from tests.samplers.families import family, inputs
from tests.samplers.test_denoisers import SEEDS, close

# SDXL


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("scheduler", "spacing"), [("EulerDiscrete", "leading"), ("DDIM", "trailing")])
def test_stable_diffusion_xl(scheduler: str, spacing: str, prediction_type: str, guidance_scale: float):
    """Euler with leading spacing is its own scheduler."""
    import diffusers

    pipe = tiny_stable_diffusion_xl(prediction_type=prediction_type)
    kind = getattr(diffusers, scheduler + "Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing=spacing, clip_sample=False)
    denoiser = denoiser_of(pipe)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10, guidance_scale)
    theirs = pipe(
        **{"prompt": PROMPTS, "negative_prompt": ["blurry", "blurry"], "num_inference_steps": 10},
        guidance_scale=guidance_scale,
        generator=generators(SEEDS),
        output_type="latent",
    ).images
    close(sample(denoiser, denoiser.encode(PROMPTS, "blurry"), plan, SEEDS), theirs)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_stable_diffusion_xl_without_a_negative_prompt(force_zeros: bool):
    """And at a size of its own, of which the UNet is told. Zeros differ from the embedding of ""."""
    pipe = tiny_stable_diffusion_xl(force_zeros=force_zeros)
    denoiser = denoiser_of(pipe)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 6, 5.0)
    theirs = pipe(
        **{"prompt": PROMPTS, "num_inference_steps": 6, "guidance_scale": 5.0, "height": 24, "width": 32},
        generator=generators(SEEDS),
        output_type="latent",
    ).images
    shape = denoiser.latent_shape(24, 32)
    close(sample(denoiser, denoiser.encode(PROMPTS), plan, SEEDS, shape), theirs)
    mixed = denoiser.encode(PROMPTS, ["", "blurry"]).negative
    for key, rows in mixed.items():
        assert bool(rows[0].any()) != force_zeros
        torch.testing.assert_close(rows[:1], denoiser.encode(PROMPTS).negative[key])
        torch.testing.assert_close(rows[1:], denoiser.encode(PROMPTS, "blurry").negative[key])


def test_stable_diffusion_xl_reads_both_encoders_the_pooled_embedding_and_the_size():
    denoiser, x, condition = inputs("stable_diffusion_xl")
    output = denoiser.predict(x, torch.ones(2), condition)

    def moved() -> bool:
        return bool((denoiser.predict(x, torch.ones(2), condition) - output).norm() > 0.01 * output.norm())

    for key, channels in (("encoder_hidden_states", 0), ("encoder_hidden_states", 16), ("text_embeds", 0)):
        kept = condition.tensors[key].clone()
        condition.tensors[key][..., channels : channels + 16] = 0
        assert moved()
        condition.tensors[key].copy_(kept)
    assert not moved()
    added = denoiser.added  # type: ignore[attr-defined]
    told = added(torch.zeros(2, 4, 12, 16), condition)["added_cond_kwargs"]["time_ids"]
    assert told.tolist() == [[24, 32, 0, 0, 24, 32]] * 2
    hidden, pooled = (condition.tensors[key] for key in ("encoder_hidden_states", "text_embeds"))
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16], [24, 32, 0, 0, 24, 32]])
    small, large = (
        denoiser.network(x, 999, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": row.repeat(2, 1)}).sample
        for row in sizes
    )
    torch.testing.assert_close(small, output)
    assert (large - small).norm() > 0.01 * small.norm()


def test_an_autoencoder_with_a_mean_is_refused():
    """Playground 2.5, whose levels are EDM's: its class is SDXL's, its samples would be noise."""
    pipe = tiny_stable_diffusion_xl()
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match="StableDiffusionXLPipeline: its autoencoder has latents_mean"):
        denoiser_of(pipe)


# Flux


def flux(pipe: Any, **call: Any) -> Tensor:
    """Latents of the stock pipeline, 16x24 pixels, unpacked."""
    size = {"height": 16, "width": 24}
    packed = pipe(PROMPTS, **call, **size, generator=generators(SEEDS), output_type="latent").images
    return pipe._unpack_latents(packed, 16, 24, pipe.vae_scale_factor)


def test_flux():
    """At a width that is not the height, told two scales; on its own grid, which is even before the shift."""
    pipe = tiny_flux()
    shape = denoiser_of(pipe).latent_shape(16, 24)
    denoiser = denoiser_of(pipe).at(shape)
    condition = denoiser.encode(PROMPTS)
    found = []
    for scale in (1.0, 3.5):
        theirs = flux(pipe, num_inference_steps=6, guidance_scale=scale)
        close(sample(denoiser, condition, uniform_plan(6, embedded_guidance=scale), SEEDS, shape), theirs)
        close(sample(denoiser, condition, uniform_plan(6, scale), SEEDS, shape), theirs)  # told, not guided twice
        found.append(theirs)
    assert (found[1] - found[0]).norm() > 0.01 * found[0].norm()


def test_flux_without_a_guidance_input():
    """Schnell's kind: guidance is the pipeline's `true_cfg_scale`."""
    pipe = tiny_flux(guidance_input=False)
    denoiser = denoiser_of(pipe)
    condition, shape = denoiser.encode(PROMPTS, "blurry"), denoiser.latent_shape(16, 24)
    for scale in (1.0, 3.0):
        theirs = flux(pipe, num_inference_steps=6, true_cfg_scale=scale, negative_prompt=["blurry"] * 2)
        close(sample(denoiser, condition, uniform_plan(6, scale), SEEDS, shape), theirs)


def test_a_network_with_a_guidance_input_is_told_the_scale():
    """Instead of classifier-free guidance, unless its condition says another: in one call, 1 where nothing is said."""
    denoiser, x, condition = inputs("flux")
    t = torch.tensor([0.9, 0.95])
    told = {w: denoiser.x0(x, t, condition.with_guidance(w)) for w in (1.0, 2.0, 4.0)}
    assert (told[4.0] - told[1.0]).norm() > 0.01 * told[1.0].norm()
    with counted([denoiser.network]) as rows:
        torch.testing.assert_close(denoiser.guided_x0(x, t, condition, 4.0), told[4.0])
    assert rows == [2]
    torch.testing.assert_close(denoiser.guided_x0(x, t, condition, 1.0), told[1.0])
    torch.testing.assert_close(denoiser.guided_x0(x, t, condition.with_guidance(2.0), 1.0), told[2.0])
    each = denoiser.guided_x0(x, t, condition, torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(each, torch.stack([told[4.0][0], told[1.0][1]]), rtol=1e-4, atol=1e-5)


# Sana


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_sana(guidance_scale: float):
    """Its own DPM-Solver++ at first order, which is Euler: told whole thousandths, on levels from 0.999 before the shift.

    And the even grid by FlowMatchEuler. At a size of its own, and with a negative prompt.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny_sana()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1)
    denoiser = denoiser_of(pipe)
    condition, shape = denoiser.encode(PROMPTS, "blurry"), denoiser.latent_shape(32, 64)
    call = {"negative_prompt": "blurry", "guidance_scale": guidance_scale, "height": 32, "width": 64}
    call |= {"use_resolution_binning": False, "output_type": "latent"}
    theirs = pipe(PROMPTS, **call, num_inference_steps=8, generator=generators(SEEDS)).images
    noise = denoiser.noise
    assert isinstance(noise, Flow)
    levels = noise.unshift(pipe.scheduler.sigmas.double()).tolist()
    told = noise.unshift(pipe.scheduler.timesteps.double() / 1000).tolist()
    assert levels[0] == pytest.approx(0.999)
    steps = (
        Step(level=t, to=s, told=time, guidance_scale=guidance_scale)
        for t, s, time in zip(levels, levels[1:], told, strict=False)
    )
    close(sample(denoiser, condition, SamplingPlan(steps=tuple(steps)), SEEDS, shape), theirs)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plan = uniform_plan(8, guidance_scale)
    theirs = pipe(PROMPTS, **call, sigmas=list(plan.levels), generator=generators(SEEDS)).images
    close(sample(denoiser, condition, plan, SEEDS, shape), theirs)


def test_latents_of_a_deep_compression_autoencoder():
    """Which has no distribution: code * scaling."""
    denoiser = family("sana")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    code = denoiser.pipeline.vae.encode(denoiser.pipeline.image_processor.preprocess(images)).latent
    assert code.shape[1:] == denoiser.latent_shape(32, 32) == (4, 8, 8)
    torch.testing.assert_close(denoiser.to_latents(images), code * 0.7)


def test_sana_reads_the_text_and_not_the_padding():
    """What its mask hides moves nothing; of the instruction only the last token is kept, a negative prompt has none."""
    denoiser, x, condition = inputs("sana")
    t = torch.tensor([0.9, 0.9])
    output = denoiser.predict(x, t, condition)
    hidden, mask = (condition.tensors[k] for k in ("encoder_hidden_states", "encoder_attention_mask"))
    assert mask.sum(1).tolist() == [2 + len(p) for p in PROMPTS]
    assert condition.negative["encoder_attention_mask"].sum() == len("blurry")
    other = torch.where(mask[..., None] == 1, hidden, hidden + 1)
    changed = replace(condition, tensors=condition.tensors | {"encoder_hidden_states": other})
    torch.testing.assert_close(denoiser.predict(x, t, changed), output)


def test_images_are_those_of_the_pipeline():
    """The same call, asked for latents and for images."""
    pipe = tiny_stable_diffusion_xl()
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
    latents, images = (
        pipe(PROMPTS, **call, generator=generators(SEEDS), output_type=t).images for t in ("latent", "pt")
    )
    close(denoiser_of(pipe).decode(latents), images)
    pipe = tiny_flux()
    latents = flux(pipe, num_inference_steps=2)
    images = pipe(
        PROMPTS, num_inference_steps=2, height=16, width=24, generator=generators(SEEDS), output_type="pt"
    ).images
    close(denoiser_of(pipe).decode(latents), images)
    pipe = tiny_sana()
    call = {"num_inference_steps": 2, "height": 32, "width": 64, "use_resolution_binning": False}
    latents, images = (
        pipe(PROMPTS, **call, generator=generators(SEEDS), output_type=t).images for t in ("latent", "pt")
    )
    close(denoiser_of(pipe).decode(latents), images)
