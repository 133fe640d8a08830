"""Tiny pipelines of every family, with random weights and tokenizers made here; the same weights on every call.

Latents are 8x8 (two frames for clips). Weights are larger than an initialisation's and none is zero, so that prompt,
time and guidance all move the output: zero-initialised layers would hide mistakes.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import fewstep.samplers  # noqa: F401  declares torchvision's operators before anything imports diffusers

PROMPTS = ["a red apple on a blue background", "a cat"]
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build from one seed without touching the caller's generator, and save to `folder` where one is given."""

    @wraps(build)
    def wrapped(folder: str | Path | None = None, **options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = build(**options)
            for module in pipeline.components.values():
                if isinstance(module, torch.nn.Module):
                    fill(module)
        pipeline.set_progress_bar_config(disable=True)
        if folder is not None:
            pipeline.save_pretrained(folder, safe_serialization=True)
        return pipeline

    return wrapped


def fill(module: torch.nn.Module) -> None:
    """Random weights of variance 1 / fan_in, small tables and biases, norms near 1, outputs of about 0.5."""
    module.requires_grad_(False).eval()
    for name, p in module.named_parameters():
        if "norm" in name and p.ndim == 1 and name.endswith("weight"):
            p.normal_(1, 0.1)
        elif p.ndim >= 2 and "table" not in name and "embedding" not in name:
            p.normal_(0, (0.5 if name.startswith(("conv_out", "proj_out")) else 1.0) / p[0].numel() ** 0.5)
        else:
            p.normal_(0, 0.3 if p.ndim >= 2 else 0.1)


def clip_tokenizer(length: int = 32) -> Any:
    """A CLIPTokenizer of characters."""
    from transformers import CLIPTokenizer

    pieces = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=length)


def t5_tokenizer() -> Any:
    """A T5Tokenizer of characters."""
    from transformers import T5Tokenizer

    pieces = [(p, 0.0) for p in ("<pad>", "</s>", "<unk>")] + [(c, -1.0) for c in ("▁", *CHARACTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def clip_text(tokenizer: Any, projection: bool = False, width: int = 16) -> Any:
    """A CLIP text encoder for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **{"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        max_position_embeddings=tokenizer.model_max_length,
        vocab_size=len(tokenizer),
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text(tokenizer: Any, multilingual: bool = False) -> Any:
    """A T5 (or UMT5) encoder of width 32 for a tokenizer."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    return UMT5EncoderModel(UMT5Config(**sizes)) if multilingual else T5EncoderModel(T5Config(**sizes))


def image_vae(shift: float | None = None) -> Any:
    """An AutoencoderKL that halves the size, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.7,
        shift_factor=shift,
    )


@seeded
def tiny_stable_diffusion(
    prediction_type: str = "epsilon", zero_terminal_snr: bool = False, guidance_input: bool = False
) -> Any:
    """`StableDiffusionPipeline`, 16x16 images, latents (4, 8, 8)."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        time_cond_proj_dim=8 if guidance_input else None,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        **{"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False},
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        image_vae(), clip_text(tokenizer), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


@seeded
def tiny_stable_diffusion_3(shift: float = 3.0, dynamic_shift: bool = False) -> Any:
    """`StableDiffusion3Pipeline`, 16x16 images, latents (4, 8, 8)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shift),
        vae=image_vae(shift=0.2),
        text_encoder=clip_text(clip, projection=True),
        tokenizer=clip,
        text_encoder_2=clip_text(clip, projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(t5),
        tokenizer_3=t5,
    )


@seeded
def tiny_wan(
    two_transformers: bool = False, boundary_ratio: float = 0.9, flow_shift: float = 3.0, expand_timesteps: bool = False
) -> Any:
    """`WanPipeline`; clips of 5 frames of 64x64 are latents (4, 2, 8, 8)."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=16,
        )

    t5 = t5_tokenizer()
    return WanPipeline(
        tokenizer=t5,
        text_encoder=t5_text(t5, multilingual=True),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.9, 1.1, 1.3, 0.7],
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        transformer=transformer(),
        transformer_2=transformer() if two_transformers else None,
        boundary_ratio=boundary_ratio if two_transformers else None,
        expand_timesteps=expand_timesteps,
    )


@seeded
def tiny_ddpm(prediction_type: str = "epsilon", clip_sample: bool = True, learned_variance: bool = False) -> Any:
    """`DDPMPipeline`, unconditional, 8x8 pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        out_channels=6 if learned_variance else 3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMPipeline(
        unet, DDPMScheduler(prediction_type=prediction_type, clip_sample=clip_sample, variance_type=variance)
    )


MILD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""In place of the published linear betas, at whose last alpha of 0.006 samples of random networks grow past 100."""

LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 7: "cock", 207: "golden retriever", 208: "Labrador retriever"}


@seeded
def tiny_dit(labels: bool = True) -> Any:
    """`DiTPipeline`, 16x16 images, latents (4, 8, 8), ImageNet's 1000 classes and the null class."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    scheduler = DDIMScheduler(**MILD, clip_sample=False)
    pipeline = DiTPipeline(transformer, image_vae(), scheduler, LABELS if labels else None)
    if labels:
        pipeline.register_to_config(id2label=LABELS)  # as in the published folder; the pipeline itself keeps them not
    return pipeline


@seeded
def tiny_pixart(sigma: bool = False, sample_size: int = 8, micro_conditions: bool = False) -> Any:
    """`PixArtAlphaPipeline` or `PixArtSigmaPipeline`, 16x16 images, latents (4, 8, 8)."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    t5 = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 32},
        num_layers=2,
        sample_size=sample_size,
        use_additional_conditions=micro_conditions,
    )
    cls = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return cls(t5, t5_text(t5), image_vae(), transformer, DPMSolverMultistepScheduler(**MILD))


@seeded
def tiny_classes(classes: int | None = 5) -> Any:
    """`ConsistencyModelPipeline` with a variance-preserving scheduler, 8x8 pixels, five classes."""
    from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    return ConsistencyModelPipeline(unet, DDIMScheduler())
