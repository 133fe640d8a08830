"""What every family promises: inputs that matter, guidance, rows apart, images, sizes, LoRA targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.noise import Flow
from tests.closed_form import GaussianTeacher
from tests.pipelines import PROMPTS, tiny_wan
from tests.samplers.families import FAMILIES, PROMPTED, SIZE, family, inputs

# what moves the output


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_time_and_guidance_move_the_output(name: str):
    denoiser, x, condition = inputs(name)
    t = torch.tensor([0.95, 0.95])
    output = denoiser.predict(x, t, condition)

    def moved(other: Tensor) -> bool:
        return bool((other - output).flatten(1).norm(dim=1).min() > 0.01 * output.flatten(1).norm(dim=1).max())

    assert moved(denoiser.predict(x, t, condition, told=t - 0.03))
    assert moved(denoiser.predict(0.9 * x, t, condition))
    if name in PROMPTED:
        assert moved(denoiser.predict(x, t, condition[[1, 0]]))
        x0 = denoiser.x0(x, t, condition)
        assert (denoiser.guided_x0(x, t, condition, 3.0) - x0).norm() > 0.01 * x0.norm()
    else:
        assert not denoiser.takes_prompts
        assert torch.equal(denoiser.predict(x, t, denoiser.encode(PROMPTS)), output)


def test_stable_diffusion_3_reads_every_encoder_and_the_pooled_projections():
    denoiser, x, condition = inputs("stable_diffusion_3")
    output = denoiser.predict(x, torch.ones(2), condition)
    tensors = condition.tensors
    clip_tokens = denoiser.pipeline.tokenizer.model_max_length
    parts = {
        "clip": ("encoder_hidden_states", (slice(None), slice(0, clip_tokens), slice(0, 16))),
        "second clip": ("encoder_hidden_states", (slice(None), slice(0, clip_tokens), slice(16, 32))),
        "t5": ("encoder_hidden_states", (slice(None), slice(clip_tokens, None))),
        "pooled": ("pooled_projections", (slice(None),)),
    }
    for key, where in parts.values():
        kept = tensors[key].clone()
        tensors[key][where] = 0
        assert (denoiser.predict(x, torch.ones(2), condition) - output).norm() > 0.01 * output.norm()
        tensors[key] = kept


# guidance and rows


@pytest.mark.parametrize("name", [name for name in PROMPTED if name != "flux"])
@pytest.mark.parametrize("scale", [0, 0.0, 1, 1.0, -1.5, 4.0])
def test_guided_x0_equals_separate_calls(name: str, scale: float):
    denoiser, x, condition = inputs(name)
    t = torch.tensor([0.9, 0.95])
    with_prompt, without = denoiser.x0(x, t, condition), denoiser.x0(x, t, condition.unconditional())
    guided = denoiser.guided_x0(x, t, condition, scale)
    torch.testing.assert_close(guided, without + scale * (with_prompt - without), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROMPTED)
def test_guided_x0_with_a_scale_per_row(name: str):
    """And with a time per row, on both sides of Wan's boundary, told another time."""
    denoiser, x, condition = inputs(name, rows=4)
    scales, t = torch.tensor([0.0, 1.0, -2.0, 5.0]), torch.tensor([0.99, 0.3, 0.6, 0.92])
    told = torch.tensor([0.95, 0.35, 0.6, 0.85])
    together = denoiser.guided_x0(x, t, condition, scales, told)
    for i in range(4):
        row = slice(i, i + 1)
        alone = denoiser.guided_x0(x[row], t[row], condition[row], scales[i].item(), told[row])
        torch.testing.assert_close(alone, together[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_differentiable(name: str):
    denoiser, x, condition = inputs(name)
    x.requires_grad_()
    t = torch.tensor([0.95, 0.4])
    (gradient,) = torch.autograd.grad(denoiser.guided_x0(x, t, condition, 2.0).square().sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0.1).all()


# Wan's two transformers


def test_wan_splits_a_batch_at_the_boundary():
    """boundary_ratio 0.9: a level on it is the first transformer's; each row equals its own network called alone."""
    denoiser, x, condition = inputs("wan", rows=4)
    t = torch.tensor([0.5, 0.95, 0.8999, 0.9])
    together = denoiser.predict(x, t, condition)
    for i, network in enumerate(("transformer_2", "transformer", "transformer_2", "transformer")):
        row = slice(i, i + 1)
        alone = denoiser.call(denoiser.networks[network], x[row], 1000 * t[row], condition[row])
        torch.testing.assert_close(alone, together[row], rtol=1e-4, atol=1e-5)
    first = denoiser.call(denoiser.networks["transformer"], x, 1000 * t, condition)
    assert (first - together)[[0, 2]].norm() > 0.01 * first.norm()


@pytest.mark.parametrize("kept", ["transformer", "transformer_2"])
def test_wan_with_one_of_two_transformers(kept: str):
    """Levels of the one that is there work; the other's are refused, naming it."""
    pipe = tiny_wan(two_transformers=True)
    missing = {"transformer": "transformer_2", "transformer_2": "transformer"}[kept]
    pipe.register_modules(**{missing: None})
    denoiser = denoiser_of(pipe)
    whole, x, condition = inputs("wan")
    mine, other = (0.95, 0.5) if kept == "transformer" else (0.5, 0.95)
    torch.testing.assert_close(
        denoiser.predict(x, torch.tensor(mine), condition), whole.predict(x, torch.tensor(mine), condition)
    )
    with pytest.raises(UserError, match=f"has no {missing},"):
        denoiser.predict(x, torch.tensor(other), condition)


def test_wan_takes_a_time_per_frame():
    """The same time in every frame is that time; the noisiest frame picks the transformer."""
    denoiser, x, condition = inputs("wan")
    t = torch.tensor([0.95, 0.4])
    whole = denoiser.x0(x, t, condition)
    torch.testing.assert_close(denoiser.x0(x, t[:, None].expand(2, 2), condition), whole, rtol=1e-4, atol=1e-5)
    frames = torch.tensor([[0.95, 0.2], [0.4, 0.1]])
    mixed = denoiser.predict(x, frames, condition)
    tokens = frames.mul(1000).repeat_interleave(16, dim=1)
    for i, network in enumerate(("transformer", "transformer_2")):
        row = slice(i, i + 1)
        alone = denoiser.networks[network](x[row], tokens[row], condition.tensors["encoder_hidden_states"][row])
        torch.testing.assert_close(mixed[row], alone.sample, rtol=1e-4, atol=1e-5)


def test_the_noisiest_frame_picks_the_phase():
    """Whichever it is; a phase ends at 0.5, which the shift of 3 takes to 0.75."""
    denoiser = GaussianTeacher(Flow(3.0))
    phased = denoiser.phased([denoiser.network] * 2, [0.5])
    frames = torch.tensor([[0.8, 0.2], [0.7, 0.2], [0.2, 0.8]])
    rows = phased.sides(phased.noise.model_time(frames))
    assert {name: of.tolist() for name, of in rows.items()} == {"phase_1": [0, 2], "phase_2": [1]}


# images


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "stable_diffusion_xl", "flux", "pixart"])
def test_latents_of_images_are_those_of_image_to_image(name: str):
    """(mode - shift) * scaling of the pipeline's own preprocessing, with the config's numbers."""
    denoiser = family(name)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vae = denoiser.pipeline.vae
    mode = vae.encode(denoiser.pipeline.image_processor.preprocess(images)).latent_dist.mode()
    shift = {"stable_diffusion_3": 0.2, "flux": 0.2}.get(name, 0.0)
    torch.testing.assert_close(denoiser.to_latents(images), (mode - shift) * 0.7)


def test_latents_of_clips():
    denoiser = family("wan")
    clips = torch.rand(2, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = denoiser.to_latents(clips)
    assert latents.shape[1:] == denoiser.latent_shape(**SIZE) == (4, 2, 8, 8)
    frames = torch.stack([denoiser.pipeline.video_processor.preprocess(c) for c in clips], dim=2)  # (F, 3, B, H, W)
    mode = denoiser.pipeline.vae.encode(frames.permute(2, 1, 0, 3, 4)).latent_dist.mode()
    mean = torch.tensor([0.1, -0.2, 0.3, 0.0]).reshape(4, 1, 1, 1)
    std = torch.tensor([0.9, 1.1, 1.3, 0.7]).reshape(4, 1, 1, 1)
    torch.testing.assert_close(latents, (mode - mean) / std)
    back = denoiser.pipeline.vae.decode(mode).sample.transpose(1, 2) / 2 + 0.5
    # random weights magnify the rounding of what was scaled there and back
    torch.testing.assert_close(denoiser.to_images(latents), back, atol=2e-3, rtol=0)


def test_pixels_are_their_own_latents():
    denoiser = family("unet2d")
    images = torch.tensor([0.0, 0.25, 1.0]).reshape(1, 3, 1, 1)
    assert denoiser.to_latents(images).flatten().tolist() == [-1, -0.5, 1]
    assert torch.equal(denoiser.to_images(denoiser.to_latents(images)), images)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_differentiable_in_latents(name: str):
    denoiser, x, _ = inputs(name, rows=1)
    x = (0.3 * x).requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.to_images(x).sum(), x)
    assert gradient.norm() > 0
    if name.startswith("unet2d"):
        assert denoiser.to_images(torch.full_like(x, 3.0)).max() == 2


# sizes


def test_sizes():
    assert family("stable_diffusion").latent_shape(24, 32) == (4, 12, 16)
    assert family("stable_diffusion_3").latent_shape() == (4, 8, 8)
    assert family("stable_diffusion_xl").latent_shape(24, 32) == (4, 12, 16)
    assert family("flux").latent_shape() == (4, 128, 128)  # packed by 2x2, hence of even sides
    assert family("sana").latent_shape() == (4, 256, 256)
    assert family("wan").latent_shape(frames=81) == (4, 21, 60, 104)
    assert family("unet2d").latent_shape(16) == (3, 16, 8)
    assert family("pixart").latent_shape(24, 32) == (4, 12, 16)
    assert family("dit").latent_shape(16) == (4, 8, 8)
    assert family("dit").pixels() == (16, 16)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("stable_diffusion", {"height": 15}, "15x16: both must be divisible by 2"),
        ("stable_diffusion_3", {"width": 18}, "16x18: both must be divisible by 4"),
        ("flux", {"height": 16, "width": 18}, "16x18: both must be divisible by 4"),
        ("sana", {"height": 48, "width": 64}, "48x64: both must be divisible by 32"),
        ("wan", {"height": 72, "width": 64}, "72x64: both must be divisible by 16"),
        ("wan", {"frames": 16}, "16 frames: must be 1 more than a multiple of 4"),
        ("unet2d", {"height": 9}, "9x8: both must be divisible by 2"),
        ("pixart", {"height": 18}, "18x16: both must be divisible by 4"),
        ("dit", {"width": 32}, "16x32: DiTPipeline samples at its own size alone, 16x16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, size: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        family(name).latent_shape(**size)


# LoRA targets


@pytest.mark.parametrize("name", FAMILIES)
def test_every_lora_target_is_there_and_attention_and_feed_forward_are_covered(name: str):
    """No name matches nothing; every linear layer of attention or feed-forward is matched."""
    denoiser = family(name)
    linear = torch.nn.Linear | torch.nn.Conv2d  # but for depthwise ones
    layers = [k for k, m in denoiser.network.named_modules() if isinstance(m, linear) and getattr(m, "groups", 1) == 1]
    matched = {k for k in layers if k.endswith(tuple("." + end for end in denoiser.lora_targets))}
    if not name.startswith("unet2d"):  # its blocks are a subset of StableDiffusion's
        for end in denoiser.lora_targets:
            assert any(k.endswith("." + end) for k in layers), end
    wanted = {k for k in layers if any(part in k for part in ("attn", "attentions", ".ff", "ffn")) and "norm" not in k}
    assert wanted
    assert wanted <= matched, wanted - matched
