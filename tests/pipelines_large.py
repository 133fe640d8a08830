"""Tiny pipelines of large text-to-image models (SDXL, Flux, Sana), as those of `tests/pipelines.py`."""

from __future__ import annotations

from typing import Any

from tests.pipelines import CHARACTERS, clip_text, clip_tokenizer, image_vae, seeded, t5_text, t5_tokenizer


@seeded
def tiny_stable_diffusion_xl(
    prediction_type: str = "epsilon", force_zeros: bool = True, width: int = 16, depth: int = 2
) -> Any:
    """`StableDiffusionXLPipeline`, 16x16 images, latents (4, 8, 8).

    Args:
        prediction_type: of the scheduler.
        force_zeros: an empty negative prompt is zeros.
        width: of the second encoder.
        depth: blocks of the inner transformers.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, depth),
        use_linear_projection=True,
        cross_attention_dim=16 + width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(),
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, projection=True, width=width),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            prediction_type=prediction_type,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


@seeded
def tiny_flux(guidance_input: bool = True) -> Any:
    """`FluxPipeline`, dev or (without a guidance input, unshifted) schnell; images of 16x16 are latents (4, 8, 8)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_input,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_input else 1.0, use_dynamic_shifting=guidance_input
        ),
        vae=image_vae(shift=0.2),
        text_encoder=clip_text(clip),
        tokenizer=clip,
        text_encoder_2=t5_text(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


def gemma_tokenizer() -> Any:
    """A GemmaTokenizer of characters."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS]
    return GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])


@seeded
def tiny_sana(flow_shift: float = 3.0) -> Any:
    """`SanaPipeline`; images of 32x32 are latents (4, 8, 8)."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = gemma_tokenizer()
    gemma = Gemma2Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    )
    kinds, multiscales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.7,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(gemma),
        vae=autoencoder,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    )
