"""Backbones at their published size, on the meta device: parameters, LoRA layers, latents.

Configs are those of the hub's repositories; where diffusers converts the authors' weights itself, its script says the same.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.real_size import SDXL
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of

FLUX = {  # transformer/config.json of black-forest-labs/FLUX.1-dev, the defaults that diffusers converts to
    **{"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128},
    **{"num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
}
FLUX_SCHEDULER = {  # its scheduler/scheduler_config.json
    **{"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    **{"base_image_seq_len": 256, "max_image_seq_len": 4096},
}
SANA = {  # scripts/convert_sana_to_diffusers.py, SanaMS_1600M_P1_D20 at 1024 pixels
    **{"in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20},
    **{"num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240},
    **{"caption_channels": 2304, "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1},
}


@pytest.fixture(scope="module")
def sdxl() -> Denoiser:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    scheduler = EulerDiscreteScheduler(
        1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return denoiser_of(StableDiffusionXLPipeline(**none, unet=unet, scheduler=scheduler, add_watermarker=False))


@pytest.fixture(scope="module")
def flux() -> Denoiser:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FLUX)
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER)
    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return denoiser_of(FluxPipeline(**none, transformer=transformer, scheduler=scheduler))


@pytest.fixture(scope="module")
def sana() -> Denoiser:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    with torch.device("meta"):
        transformer = SanaTransformer2DModel(**SANA)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return denoiser_of(SanaPipeline(**none, transformer=transformer, scheduler=scheduler))


def parameters(denoiser: Denoiser) -> int:
    return sum(p.numel() for p in denoiser.network.parameters())


def adapted(denoiser: Denoiser) -> dict[str, nn.Module]:
    """Layers that a LoRA of the family's targets adapts."""
    ends = denoiser.lora_targets
    return {
        name: layer
        for name, layer in denoiser.network.named_modules()
        if name in ends or name.endswith(tuple(f".{end}" for end in ends))
    }


def lora_parameters(denoiser: Denoiser, rank: int) -> int:
    """Down: r x in x kernel, up: out x r."""
    return sum(rank * (w[0].numel() + w.shape[0]) for m in adapted(denoiser).values() if (w := m.weight) is not None)


def test_sdxl(sdxl: Denoiser):
    """2.6B (SDXL's paper, table 1); an LCM-LoRA of rank 64 has 197M (arXiv:2311.05556, table 1)."""
    assert round(parameters(sdxl) / 1e8) == 26
    assert round(lora_parameters(sdxl, 64) / 1e6) == 197
    assert sdxl.latent_shape() == (4, 128, 128)
    assert sdxl.latent_shape(832, 1216) == (4, 104, 152)
    assert sdxl.pixels() == (1024, 1024)


def test_flux_dev(flux: Denoiser):
    """12B (its model card); the shift at 1024 pixels, 4096 tokens, is exp(1.15), at 512 exp of the straight line there."""
    assert round(parameters(flux) / 1e9) == 12
    assert flux.takes_guidance
    assert flux.latent_shape() == (16, 128, 128)
    assert flux.pixels(768, 1360) == (768, 1360)
    for side, tokens in ((1024, 4096), (512, 1024)):
        noise = flux.at(flux.latent_shape(side, side)).noise
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        assert noise.shift(torch.tensor(0.5)).item() == pytest.approx(math.exp(mu) / (1 + math.exp(mu)))
    ends = {name.rpartition("transformer_blocks.")[2].partition(".")[2] for name in adapted(flux)}
    assert {"attn.to_q", "attn.add_q_proj", "ff.net.2", "ff_context.net.2", "proj_mlp", "proj_out"} <= ends
    # 8 of attention and 4 of feed-forward in each double block, 5 in each single one, and the last
    assert len(adapted(flux)) == 19 * 12 + 38 * 5 + 1


def test_sana(sana: Denoiser):
    """1.6B; its autoencoder makes 32x32 of 1024 pixels (arXiv:2410.10629)."""
    assert round(parameters(sana) / 1e8) == 16
    assert sana.latent_shape() == (32, 32, 32)
    assert sana.latent_shape(512, 768) == (32, 16, 24)
    assert sana.pixels() == (1024, 1024)
    assert sana.noise.shift(torch.tensor(0.5)).item() == pytest.approx(0.75)
    assert len(adapted(sana)) == 20 * (4 + 4 + 2)
