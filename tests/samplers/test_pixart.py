"""PixArt: equal to its stock pipelines, and reads all that it is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators, plan_of_levels, plan_of_scheduler, sample
from fewstep.samplers.rules import randn
from tests.pipelines import PROMPTS, tiny_pixart
from tests.samplers.families import inputs
from tests.samplers.test_denoisers import SEEDS, close


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("variant", ["alpha", "alpha with micro-conditions", "sigma"])
def test_pixart(variant: str, guidance_scale: float):
    """The stock pipeline tells the size where the transformer's own is 1024 pixels, and only there."""
    from diffusers import DDIMScheduler

    micro = "micro" in variant
    pipe = tiny_pixart(sigma=variant == "sigma", sample_size=128 if micro else 8, micro_conditions=micro)
    denoiser = denoiser_of(pipe)  # reads DPM-Solver++'s config
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10, guidance_scale)
    theirs = pipe(
        **denoiser.call_arguments(pipe, PROMPTS),
        **{"negative_prompt": ["blurry"] * 2, "num_inference_steps": 10, "height": 16, "width": 24},
        **{"guidance_scale": guidance_scale, "use_resolution_binning": False},
        generator=generators(SEEDS),
        output_type="latent",
    ).images
    shape = denoiser.latent_shape(16, 24)
    close(sample(denoiser, denoiser.encode(PROMPTS, "blurry"), plan, SEEDS, shape), theirs)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("variant", ["alpha", "sigma"])
def test_pixart_by_its_own_scheduler(variant: str, guidance_scale: float):
    """DPM-Solver++ at first order is the ODE's step (arXiv:2211.01095, 4.1) on the levels of its timesteps, to sigma 0."""
    pipe = tiny_pixart(sigma=variant == "sigma")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1)
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.algorithm_type) == (
        "DPMSolverMultistepScheduler",
        "dpmsolver++",
    )
    denoiser = denoiser_of(pipe)
    theirs = pipe(
        **denoiser.call_arguments(pipe, PROMPTS),
        **{"negative_prompt": ["blurry"] * 2, "num_inference_steps": 8, "height": 16, "width": 24},
        **{"guidance_scale": guidance_scale, "use_resolution_binning": False},
        generator=generators(SEEDS),
        output_type="latent",
    ).images
    levels = denoiser.noise.from_model_time(pipe.scheduler.timesteps.double()).tolist()
    assert len(levels) == 8
    plan = plan_of_levels(levels, guidance_scale=guidance_scale)
    shape = denoiser.latent_shape(16, 24)
    close(sample(denoiser, denoiser.encode(PROMPTS, "blurry"), plan, SEEDS, shape), theirs)


def test_pixart_drops_a_learned_variance():
    """The first half of the channels is the prediction."""
    denoiser = denoiser_of(tiny_pixart())
    x, condition = randn((2, 4, 8, 8), generators(SEEDS)), denoiser.encode(PROMPTS)
    both = denoiser.network(x, timestep=torch.tensor([999.0, 499.0]), **condition.tensors).sample
    assert both.shape == (2, 8, 8, 8)
    torch.testing.assert_close(denoiser.predict(x, torch.tensor([1.0, 0.5]), condition), both[:, :4])


def test_images_are_those_of_the_pipeline():
    pipe = tiny_pixart()
    call = {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        **denoiser_of(pipe).call_arguments(pipe, PROMPTS),
        "use_resolution_binning": False,
    }
    latents, images = (pipe(**call, generator=generators(SEEDS), output_type=o).images for o in ("latent", "pt"))
    close(denoiser_of(pipe).decode(latents, batch_size=1), images)


def test_pixart_reads_the_mask_and_is_told_the_size():
    """Tokens that the mask leaves out change nothing; another height changes the output."""
    denoiser, x, condition = inputs("pixart")
    output = denoiser.predict(x, torch.ones(2), condition)
    hidden, mask = (condition.tensors[k] for k in ("encoder_hidden_states", "encoder_attention_mask"))
    assert hidden.shape[1] == mask.shape[1] == 120
    assert mask.sum(dim=1).tolist() == [34, 7]  # characters, a space before the first, and the end
    kept = hidden.clone()
    hidden[mask == 0] = 100
    torch.testing.assert_close(denoiser.predict(x, torch.ones(2), condition), output)
    hidden.copy_(kept)
    embedder = denoiser.network.adaln_single.emb
    seen: list[Tensor] = []
    handles = [
        m.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for m in (embedder.additional_condition_proj,)
    ]
    denoiser.predict(torch.randn(2, 4, 12, 16), torch.ones(2), condition)
    handles[0].remove()
    assert [s.tolist() for s in seen] == [[24, 32, 24, 32], [0.75, 0.75]]
    for layer in (embedder.resolution_embedder, embedder.aspect_ratio_embedder):
        bias, before = layer.linear_2.bias, layer.linear_2.bias.clone()
        bias += 1
        assert (denoiser.predict(x, torch.ones(2), condition) - output).norm() > 0.01 * output.norm()
        bias.copy_(before)
