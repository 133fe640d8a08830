"""Networks of published size, on the meta device: what a LoRA adapts, how many weights, which latents.

Configs are those of the published repositories, as diffusers' scripts/convert_*_to_diffusers.py write them (Stable
Diffusion's are the defaults of its classes). Counts are those that papers and model cards state, to their own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of


@dataclass(frozen=True)
class Published:
    """One published backbone.

    Attributes:
        build: its pipeline with `None` for tokenizers and text encoders, weights on the meta device.
        millions: weights of one network, and how far the stated figure may be from the truth, relative.
        lora_layers: layers of one network that a LoRA adapts by default.
        latents: of one sample, by the size that is asked for; {} is the pipeline's own.
        size: see latents.
        networks: how many there are.
    """

    build: Callable[[], Any]
    millions: tuple[float, float]
    lora_layers: int
    latents: tuple[int, ...]
    size: dict[str, int] = field(default_factory=dict)
    networks: int = 1


def on_meta(build: Callable[..., Any], **options: Any) -> Any:
    """A module without weights in memory; schedulers need theirs."""
    with torch.device("meta"):
        return build(**options)


def image_vae(channels: int = 4) -> Any:
    """Of SD, SD 3, DiT and PixArt alike: a factor of 8."""
    from diffusers import AutoencoderKL

    down, up = (f"{kind}Block2D" for kind in ("DownEncoder", "UpDecoder"))
    return on_meta(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=(down,) * 4,
        up_block_types=(up,) * 4,
        latent_channels=channels,
    )


def stable_diffusion(**options: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = on_meta(UNet2DConditionModel, **options)
    parts: tuple[Any, ...] = (image_vae(), None, None, unet, DDIMScheduler(), None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def stable_diffusion_35_medium() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = on_meta(
        SD3Transformer2DModel,
        **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24},
        **{"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536},
        **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    encoders: dict[str, Any] = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, image_vae(16), **encoders)


def wan(heads: int, layers: int, feed_forward: int, boundary_ratio: float | None = None) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> Any:
        return on_meta(WanTransformer3DModel, num_attention_heads=heads, num_layers=layers, ffn_dim=feed_forward)

    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    networks = {"transformer": transformer(), "transformer_2": transformer() if boundary_ratio else None}
    return WanPipeline(
        None,
        None,
        on_meta(AutoencoderKLWan),
        scheduler,
        **networks,
        boundary_ratio=boundary_ratio,  # type: ignore[arg-type]
    )


def dit(sample_size: int) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    return DiTPipeline(
        on_meta(DiTTransformer2DModel, out_channels=8, sample_size=sample_size), image_vae(), DDIMScheduler()
    )  # type: ignore[arg-type]


def pixart(pipeline: str, sample_size: int, micro_conditions: bool | None) -> Any:
    import diffusers

    transformer = on_meta(
        diffusers.PixArtTransformer2DModel,
        sample_size=sample_size,
        caption_channels=4096,
        use_additional_conditions=micro_conditions,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return getattr(diffusers, pipeline)(None, None, image_vae(), transformer, scheduler)


def imagenet_64() -> Any:
    from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel

    unet = on_meta(
        UNet2DModel,
        **{"sample_size": 64, "layers_per_block": 3, "num_class_embeds": 1000, "attention_head_dim": 64},
        block_out_channels=(192, 384, 576, 768),
        down_block_types=("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
        up_block_types=(*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        **{"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"},
    )
    return ConsistencyModelPipeline(unet, DDIMScheduler())  # type: ignore[arg-type]


UNET = 16 * (4 + 4 + 2 + 2) + 22 * 3 + 14 + 3 + 3
"""16 transformers (two attentions of 4, feed-forward of 2, in and out), 22 residual blocks of 3, 14 shortcuts, resamplers."""
MMDIT = 24 * (4 + 3 + 2) + 23 * (1 + 2) + 13 * 4
"""24 blocks of both streams, the last without text's output and feed-forward; 13 with a second attention."""
DIT = 28 * (4 + 2)
PIXART = 28 * (4 + 4 + 2)
ADM = (9 + 1 + 12) * 4 + (12 + 3 + 2 + 16 + 3) * 3 + 3 + 16
"""22 attentions of 4, 36 residual blocks of 3 (six of them resample), shortcuts where channels change."""

EMBEDDERS = 256 * 1152 + 1152 + 1152**2 + 1152 + 1001 * 1152
"""Of time and class, which diffusers gives to each of DiT's 28 blocks: 27 more of them than the paper's 675M count."""

CLIP = {"height": 480, "width": 832, "frames": 81}
TABLE = {
    # 860M and 865M: SDXL's paper, table 1 (arXiv:2307.01952)
    "SD 1.5": Published(
        lambda: stable_diffusion(cross_attention_dim=768, sample_size=64), (860, 1e-3), UNET, (4, 64, 64)
    ),
    "SD 2.1": Published(
        lambda: stable_diffusion(
            **{"cross_attention_dim": 1024, "sample_size": 96, "use_linear_projection": True},
            attention_head_dim=(5, 10, 20, 20),
        ),
        (865, 2e-3),
        UNET,
        (4, 96, 96),
    ),
    # 2.5 billion: its card, without saying of which parts
    "SD 3.5 medium": Published(stable_diffusion_35_medium, (2500, 0.12), MMDIT, (16, 128, 128)),
    # 1.3 and 14 billion: arXiv:2503.20314
    "Wan 2.1 1.3B": Published(lambda: wan(12, 30, 8960), (1300, 0.1), 30 * 10, (16, 21, 60, 104), CLIP),
    "Wan 2.2 A14B": Published(
        lambda: wan(40, 40, 13824, boundary_ratio=0.875), (14000, 0.03), 40 * 10, (16, 21, 60, 104), CLIP, networks=2
    ),
    # 675M: arXiv:2212.09748, table 1
    "DiT-XL/2 256": Published(lambda: dit(32), (675 + 27 * EMBEDDERS / 1e6, 1e-3), DIT, (4, 32, 32)),
    "DiT-XL/2 512": Published(lambda: dit(64), (675 + 27 * EMBEDDERS / 1e6, 1e-3), DIT, (4, 64, 64)),
    # 0.6 billion: arXiv:2310.00426
    "PixArt-alpha 512": Published(lambda: pixart("PixArtAlphaPipeline", 64, None), (600, 0.03), PIXART, (4, 64, 64)),
    "PixArt-alpha 1024": Published(
        lambda: pixart("PixArtAlphaPipeline", 128, None),
        (600, 0.03),
        PIXART,
        (4, 96, 168),
        {"height": 768, "width": 1344},
    ),
    "PixArt-sigma 1024": Published(
        lambda: pixart("PixArtSigmaPipeline", 128, False), (600, 0.03), PIXART, (4, 128, 128)
    ),
    # 296M: arXiv:2105.05233, of ImageNet 64
    "ADM ImageNet-64": Published(imagenet_64, (296, 1e-3), ADM, (3, 64, 64)),
}


@cache
def denoiser(name: str) -> Denoiser:
    return denoiser_of(TABLE[name].build())


@pytest.mark.parametrize("name", TABLE)
def test_a_published_network(name: str):
    """The size that its authors state, the default LoRA's layers and weights, and the latents of a sample."""
    entry, made = TABLE[name], denoiser(name)
    assert len(made.networks) == entry.networks
    assert made.latent_shape(**entry.size) == entry.latents
    assert made.pixels(entry.size.get("height"), entry.size.get("width")) == (
        tuple(entry.size[k] for k in ("height", "width"))
        if entry.size
        else tuple(n * (1 if entry.latents[0] == 3 else 8) for n in entry.latents[-2:])
    )
    stated, rounding = entry.millions
    for network in made.networks.values():
        assert all(p.is_meta for p in network.parameters())
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(stated, rel=rounding)
        linear = {k: m for k, m in network.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        adapted = {k for k in linear if k.endswith(tuple("." + end for end in made.lora_targets))}
        assert len(adapted) == entry.lora_layers
        blocks = {
            k for k in linear if any(part in k for part in ("attn", "attentions", ".ff", "ffn")) and "norm" not in k
        }
        assert blocks <= adapted


def test_which_networks_are_told_the_size():
    """PixArt-alpha at 1024 pixels: `use_additional_conditions` is unset, and follows from the sample's size."""
    told = {name for name in TABLE if getattr(denoiser(name).network, "use_additional_conditions", False)}
    assert told == {"PixArt-alpha 1024"}
