"""`StableDiffusionPipeline`: SD 1.x, SD 2.x and their fine-tunes; UNet with cross-attention, epsilon or v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.adapters import bare
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size

UNET_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


GUIDANCE_DIMENSIONS = 256
"""Of the embedded guidance scale, as in LCM's own UNets."""


def guidance_embedding(scale: Tensor, dimensions: int) -> Tensor:
    """Sinusoid of 1000 (scale - 1), (B, dimensions): what StableDiffusionPipeline feeds to `time_cond_proj_dim`."""
    frequencies = torch.exp(
        torch.arange(dimensions // 2, device=scale.device) * (-9.210340371976184 / (dimensions // 2 - 1))
    )
    angle = (1000 * (scale.float() - 1))[:, None] * frequencies[None]
    embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dimensions % 2))


class StableDiffusion(Denoiser):
    """Condition: `encoder_hidden_states` (B, tokens, width). A UNet with a guidance input is told 1 where nothing else is said."""

    network_names = ("unet",)
    lora_targets = UNET_LORA_TARGETS

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        return ("mid_block",)

    @property
    def takes_guidance(self) -> bool:
        return self.network.config.time_cond_proj_dim is not None

    def with_guidance_input(self) -> Denoiser:
        unet: Any = bare(self.network)
        # published configs lack the key, diffusers lists what they lack, and drops what is listed
        config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        with torch.device(unet.device):  # without weights where the base has none
            new = type(unet).from_config({**config, "time_cond_proj_dim": GUIDANCE_DIMENSIONS})
        missing, _ = new.load_state_dict(unet.state_dict(), strict=False)
        assert missing == ["time_embedding.cond_proj.weight"]
        # published scripts leave it random; zero, the student starts as the teacher
        torch.nn.init.zeros_(new.time_embedding.cond_proj.weight)
        return self.with_networks({"unet": new.to(unet.device, unet.dtype).requires_grad_(False).eval()})

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(prompts, self.pipeline.text_encoder.device, 1, False)
        return {"encoder_hidden_states": hidden.float()}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        extra = self.added(x_t, condition)
        if self.takes_guidance:
            told = torch.ones(len(x_t)) if condition.guidance is None else condition.guidance
            embedding = guidance_embedding(told.to(x_t.device), self.network.config.time_cond_proj_dim)
            extra["timestep_cond"] = embedding.to(self.network.dtype)
        dtype = self.network.dtype
        hidden = condition.tensors["encoder_hidden_states"].to(dtype)
        return network(x_t.to(dtype), time, encoder_hidden_states=hidden, return_dict=False, **extra)[0]

    def added(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """What else the UNet is told, by the names of its arguments."""
        return {}

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config, factor = self.network.config, self.pipeline.vae_scale_factor
        height, width = pipeline_size(height, width, config.sample_size, factor, factor)
        return config.in_channels, height // factor, width // factor
