"""`StableDiffusionXLPipeline`: SDXL base and its fine-tunes; UNet told a pooled embedding and sizes, epsilon or v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.stable_diffusion import StableDiffusion
from fewstep.samplers.errors import UserError


class StableDiffusionXL(StableDiffusion):
    """Condition: `encoder_hidden_states` (B, tokens, width), the two encoders' side by side; `text_embeds` (B, width).

    The sizes that the UNet is told are the condition's, or else those of the sample: an image neither enlarged nor cropped,
    as the pipeline says unless told otherwise.
    """

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any):
        super().__init__(pipeline, *args, **kwargs)
        if getattr(getattr(pipeline, "vae", None), "config", {}).get("latents_mean"):
            raise UserError("StableDiffusionXLPipeline: its autoencoder has latents_mean, which are not supported")

    def embed_negative(self, prompts: list[str]) -> dict[str, Tensor]:
        """An empty negative prompt is none: zeros, unless the pipeline's config asks for its embedding."""
        embeds = self.embed(prompts)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            said = [bool(text) for text in prompts]
            embeds = {k: torch.stack([row * s for row, s in zip(v, said, strict=True)]) for k, v in embeds.items()}
        return embeds

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        p = self.pipeline
        hidden, _, pooled, _ = p.encode_prompt(
            prompts, device=p.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden.float(), "text_embeds": pooled.float()}

    def added(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        sizes = condition.sizes
        if sizes is None:
            height, width = (n * self.pipeline.vae_scale_factor for n in x_t.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width])
        sizes = sizes.to(x_t.device, torch.float32)
        pooled = condition.tensors["text_embeds"].to(self.network.dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(x_t), 6)}}
