"""`PixArtAlphaPipeline`, `PixArtSigmaPipeline`: DiT with cross-attention to T5, epsilon with a learned variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size


class PixArt(Denoiser):
    """Condition: `encoder_hidden_states` (B, tokens, width), `encoder_attention_mask` (B, tokens), 1 = to be read.

    Where the transformer takes them (PixArt-alpha at 1024 pixels), size and aspect ratio follow from the sample's shape.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    takes_lora = False

    @staticmethod
    def call_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
        # by default captions are cleaned, but only where two further packages happen to be installed
        return {"prompt": list(prompts), "clean_caption": False}

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        p = self.pipeline
        hidden, mask, _, _ = p.encode_prompt(prompts, do_classifier_free_guidance=False, device=p.text_encoder.device)
        return {"encoder_hidden_states": hidden.float(), "encoder_attention_mask": mask.float()}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        tensors = {k: v.to(dtype) for k, v in condition.tensors.items()}
        size = self._size(x_t, dtype)
        output = network(x_t.to(dtype), timestep=time, added_cond_kwargs=size, return_dict=False, **tensors)[0]
        return output[:, : x_t.shape[1]]  # the learned variance follows

    def _size(self, x_t: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Height and width in pixels (B, 2) and their ratio (B, 1), for a transformer that is told them."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (n * self.pipeline.vae_scale_factor for n in x_t.shape[-2:])
        rows = torch.ones(len(x_t), 1, device=x_t.device)
        resolution = (rows * rows.new_tensor([height, width])).to(dtype)
        return {"resolution": resolution, "aspect_ratio": (rows * (height / width)).to(dtype)}

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config, factor = self.network.config, self.pipeline.vae_scale_factor
        height, width = pipeline_size(height, width, config.sample_size * factor, factor * config.patch_size)
        return config.in_channels, height // factor, width // factor
