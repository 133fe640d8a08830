"""`StableDiffusion3Pipeline`: SD 3 and 3.5; MMDiT with three text encoders, flow matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.noise_config import from_scheduler


class StableDiffusion3(Denoiser):
    """Condition: `encoder_hidden_states` (B, tokens, width), CLIP's then T5's; `pooled_projections` (B, width)."""

    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def noise_process(self, latent_shape: tuple[int, ...] | None) -> NoiseProcess:
        _, height, width = latent_shape or self.latent_shape()
        patch = self.network.config.patch_size
        return from_scheduler(self.pipeline.scheduler, (height // patch) * (width // patch))

    def feature(self, output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[-1]  # a block's text comes first

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        p = self.pipeline
        hidden, _, pooled, _ = p.encode_prompt(
            prompts, None, None, device=p.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden.float(), "pooled_projections": pooled.float()}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        tensors = {k: v.to(dtype) for k, v in condition.tensors.items()}
        return network(hidden_states=x_t.to(dtype), timestep=time, return_dict=False, **tensors)[0]

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config, factor = self.network.config, self.pipeline.vae_scale_factor
        height, width = pipeline_size(height, width, config.sample_size * factor, factor * config.patch_size)
        return config.in_channels, height // factor, width // factor
