"""`WanPipeline`: Wan 2.1 and 2.2 text-to-video, flow matching; Wan 2.2 splits the levels between two transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size
from fewstep.samplers.errors import UserError
from fewstep.samplers.features import quarters

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # defaults of WanPipeline's own call
TOKENS = 512  # as there: its `encode_prompt` alone would cut at 226


class Wan(Denoiser):
    """Condition: `encoder_hidden_states` (B, 512, width). Latents (C, frames, height, width).

    `transformer` takes the levels whose model time is at or above `boundary_ratio` of the whole, `transformer_2` the
    rest; either may be missing where only the other's levels are used.
    """

    network_names = ("transformer", "transformer_2")
    clips = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        p = self.pipeline
        hidden, _ = p.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=p.text_encoder.device
        )
        return {"encoder_hidden_states": hidden.float()}

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        return quarters(self.network.blocks, "blocks")

    @property
    def boundaries(self) -> tuple[float, ...]:
        ratio = self.pipeline.config.boundary_ratio
        return () if ratio is None or len(self.networks) == 1 else (ratio,)

    def route(self, time: Tensor) -> dict[str, Tensor]:
        """Rows on each side of the boundary. Of frames the noisiest decides."""
        ratio = self.pipeline.config.boundary_ratio
        high = torch.ones(len(time), dtype=torch.bool, device=time.device)
        if ratio is not None:
            # float32, as the pipeline compares: a level on the boundary itself is the first transformer's
            noisiest = (time if time.ndim == 1 else time.amax(dim=1)).float()
            high = noisiest >= ratio * self.pipeline.scheduler.config.num_train_timesteps
        sides = {"transformer": high.nonzero()[:, 0], "transformer_2": (~high).nonzero()[:, 0]}
        sides = {name: rows for name, rows in sides.items() if len(rows)}
        for name in sides:
            if name not in self.networks:
                side = "below" if name == "transformer_2" else "at or above"
                raise UserError(
                    f"WanPipeline: has no {name}, which takes levels {side} boundary_ratio; load one that has"
                )
        return sides

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        if time.ndim == 2:  # the transformer takes a time per token
            patch_frames, patch_height, patch_width = self.network.config.patch_size
            tokens = (x_t.shape[-2] // patch_height) * (x_t.shape[-1] // patch_width)
            time = time[:, ::patch_frames].repeat_interleave(tokens, dim=1)
        hidden = condition.tensors["encoder_hidden_states"].to(dtype)
        return network(hidden_states=x_t.to(dtype), timestep=time, encoder_hidden_states=hidden, return_dict=False)[0]

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        p, config, frames = self.pipeline, self.network.config, frames or FRAMES
        factor, stride = p.vae_scale_factor_spatial, p.vae_scale_factor_temporal
        height, width = pipeline_size(height, width, (HEIGHT, WIDTH), factor * config.patch_size[1])
        if (frames - 1) % stride:
            raise UserError(f"{frames} frames: must be 1 more than a multiple of {stride}, e.g. {stride * 4 + 1}")
        return config.in_channels, (frames - 1) // stride + 1, height // factor, width // factor

    def frames(self, frames: int | None = None) -> tuple[int, float] | None:
        return frames or FRAMES, self.frames_per_second(self.pipeline)

    @staticmethod
    def frames_per_second(pipeline: Any) -> float:
        """16, of Wan 2.2 TI2V 5B, which tells a time for each token, 24."""
        return 24 if pipeline.config.expand_timesteps else 16

    def to_latents(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        clips = (2 * images - 1).transpose(1, 2).to(vae.dtype)
        mean, std = self._statistics(images)
        return (vae.encode(clips).latent_dist.mode().float() - mean) / std

    def to_images(self, latents: Tensor) -> Tensor:
        """Clips (B, F, 3, H, W); the decoder itself clamps them to 0..1."""
        vae = self.pipeline.vae
        mean, std = self._statistics(latents)
        clips = vae.decode((latents * std + mean).to(vae.dtype)).sample.float()
        return clips.transpose(1, 2) / 2 + 0.5

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(v, device=like.device).reshape(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return mean, std
