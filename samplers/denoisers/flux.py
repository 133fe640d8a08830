"""`FluxPipeline`: FLUX.1 dev, told the guidance scale, and schnell; MMDiT on packed latents, flow matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.noise_config import from_scheduler
from fewstep.samplers.rules import add_noise


def packed(latents: Tensor) -> Tensor:
    """Latents (B, C, height, width) to tokens (B, height / 2 * width / 2, 4 C), as the pipeline packs them."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def unpacked(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `packed`, for latents of a shape (B, C, height, width)."""
    return pixel_shuffle(tokens.mT.unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)


class Flux(Denoiser):
    """Condition: `encoder_hidden_states` (B, 512, width), T5's; `pooled_projections` (B, width), CLIP's.

    Latents are (B, C, height, width); the transformer sees their patches of 2x2 as tokens. One with a guidance input
    (dev) is told 1 where nothing else is said.
    """

    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    )

    @property
    def takes_guidance(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        parts = ("transformer_blocks", "single_transformer_blocks")
        blocks = [f"{part}.{i}" for part in parts for i in range(len(getattr(self.network, part)))]
        return tuple(dict.fromkeys(blocks[-(-len(blocks) * quarter // 4) - 1] for quarter in (1, 2, 3, 4)))

    def feature(self, output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[-1]  # a block's text comes first

    def noise_process(self, latent_shape: tuple[int, ...] | None) -> NoiseProcess:
        _, height, width = latent_shape or self.latent_shape()
        return from_scheduler(self.pipeline.scheduler, (height // 2) * (width // 2))

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        hidden, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline.text_encoder.device)
        return {"encoder_hidden_states": hidden.float(), "pooled_projections": pooled.float()}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype, device, (height, width) = self.network.dtype, x_t.device, (n // 2 for n in x_t.shape[-2:])
        tensors = {k: v.to(dtype) for k, v in condition.tensors.items()}
        if self.takes_guidance:
            told = torch.ones(len(x_t)) if condition.guidance is None else condition.guidance
            tensors["guidance"] = told.to(device, dtype)
        places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width)))
        output = network(
            hidden_states=packed(x_t.to(dtype)),
            timestep=time.to(dtype) / 1000,  # rounded as the pipeline's, before the network multiplies it again
            img_ids=places.float(),
            txt_ids=torch.zeros(tensors["encoder_hidden_states"].shape[1], 3, device=device),
            return_dict=False,
            **tensors,
        )[0]
        return unpacked(output, x_t.shape)

    def add_noise(self, mean: Tensor, std: Tensor | float, random: list[torch.Generator]) -> Tensor:
        return unpacked(add_noise(packed(mean), std, random), mean.shape)  # the scheduler steps packed latents

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        height, width = pipeline_size(height, width, self.pipeline.default_sample_size * factor, 2 * factor)
        return self.network.config.in_channels // 4, height // factor, width // factor
