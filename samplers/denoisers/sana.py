"""`SanaPipeline`: Sana 0.6B to 4.8B; linear attention, Gemma as text encoder, deep compression autoencoder, flow."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size

SIDE = 1024  # default of SanaPipeline's own call, whatever the checkpoint's size
MULTIPLE = 32  # of the sizes that the pipeline takes


class Sana(Denoiser):
    """Condition: `encoder_hidden_states` (B, 300, width), `encoder_attention_mask` (B, 300), 1 where there is text.

    A prompt follows the pipeline's own instruction to the text encoder, a negative prompt does not.
    """

    # the depthwise convolution between the last two has no small factors
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return self._embed(prompts, instruction)

    def embed_negative(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._embed(prompts, None)

    def _embed(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        p = self.pipeline
        hidden, mask, _, _ = p.encode_prompt(
            prompts, False, device=p.text_encoder.device, complex_human_instruction=instruction
        )
        return {"encoder_hidden_states": hidden.float(), "encoder_attention_mask": mask.float()}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        tensors = {k: v.to(dtype) for k, v in condition.tensors.items()}
        time = time * self.network.config.timestep_scale
        output = network(hidden_states=x_t.to(dtype), timestep=time, return_dict=False, **tensors)[0]
        return output[:, : x_t.shape[1]]  # a learned variance may follow

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config, factor = self.network.config, self.pipeline.vae_scale_factor
        height, width = pipeline_size(height, width, SIDE, math.lcm(MULTIPLE, factor * config.patch_size))
        return config.in_channels, height // factor, width // factor

    def to_latents(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.encode((2 * images - 1).to(vae.dtype)).latent.float() * vae.config.scaling_factor

    def to_images(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float() / 2 + 0.5
