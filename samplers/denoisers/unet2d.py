"""`DDPMPipeline`: unconditional `UNet2DModel` in pixel space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size
from fewstep.samplers.denoisers.stable_diffusion import UNET_LORA_TARGETS
from fewstep.samplers.errors import UserError


class UNet2D(Denoiser):
    """Condition: nothing but the number of rows; guidance changes nothing. Latents are pixels in -1..1."""

    network_names = ("unet",)
    lora_targets = UNET_LORA_TARGETS
    takes_lora = False
    takes_prompts = False

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any):
        super().__init__(pipeline, *args, **kwargs)
        if pipeline.unet.config.class_embed_type or pipeline.unet.config.num_class_embeds:
            raise UserError("DDPMPipeline: its UNet2DModel is class-conditional, which is not supported")

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        return ("mid_block",)

    def encode(self, prompts: Sequence[str], negative: str | Sequence[str] = "") -> Condition:
        """As many rows as prompts, whatever they say."""
        return Condition({}, len(prompts))

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        output = network(x_t.to(self.network.dtype), time, return_dict=False)[0]
        return output[:, : x_t.shape[1]]  # a learned variance may follow

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config = self.network.config
        size = config.sample_size
        default_height, default_width = (size, size) if isinstance(size, int) else size
        multiple = 2 ** (len(config.block_out_channels) - 1)
        height, width = pipeline_size(height or default_height, width or default_width, default_height, multiple)
        return config.in_channels, height, width

    def to_latents(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def to_images(self, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5
