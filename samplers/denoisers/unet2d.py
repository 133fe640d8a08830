"""`DDPMPipeline`, `ConsistencyModelPipeline`: `UNet2DModel` in pixel space, unconditional or of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, pipeline_size
from fewstep.samplers.denoisers.class_labels import class_ids, example_labels
from fewstep.samplers.denoisers.stable_diffusion import UNET_LORA_TARGETS
from fewstep.samplers.errors import UserError


class UNet2D(Denoiser):
    """Condition: nothing but the number of rows, or `class_labels` (B,), int64. Latents are pixels in -1..1.

    Only ConsistencyModelPipeline passes labels on. Its networks have no null class that a config would name: guidance
    changes nothing unless the negative prompt is a label, the class that training dropped labels to.
    """

    network_names = ("unet",)
    lora_targets = UNET_LORA_TARGETS
    takes_lora = False

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any):
        if type(pipeline.scheduler).__name__ == "CMStochasticIterativeScheduler":
            raise UserError(
                "ConsistencyModelPipeline: with CMStochasticIterativeScheduler it samples in few steps already and is no "
                "teacher: its network gives ends of trajectories, not means; a teacher has DDPMScheduler or the like"
            )
        super().__init__(pipeline, *args, **kwargs)
        name, config = type(pipeline).__name__, pipeline.unet.config
        if config.class_embed_type:
            raise UserError(f"{name}: class_embed_type {config.class_embed_type} is not supported; only labels are")
        if config.num_class_embeds and name == "DDPMPipeline":
            raise UserError(
                "DDPMPipeline: its UNet2DModel is class-conditional, and this pipeline passes no label on; "
                "save it as ConsistencyModelPipeline(unet, scheduler), which does"
            )
        if config.out_channels != config.in_channels:
            raise UserError(
                f"{name}: its network predicts {config.out_channels} channels for {config.in_channels}, a variance beside the "
                "noise, and this pipeline does not split them for schedulers of few steps; save the network without it"
            )
        self.takes_prompts = bool(config.num_class_embeds)
        self.examples = example_labels(config.num_class_embeds or 0, {})

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        return ("mid_block",)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        if not self.takes_prompts:
            return {}
        labels = class_ids(prompts, self.network.config.num_class_embeds, {})
        return {"class_labels": torch.tensor(labels, device=self.device)}

    def embed_negative(self, prompts: list[str]) -> dict[str, Tensor]:
        return self.embed(prompts) if any(prompts) else {}

    @staticmethod
    def call_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
        if type(pipeline).__name__ == "DDPMPipeline" and pipeline.scheduler.init_noise_sigma > 1:
            name = type(pipeline.scheduler).__name__
            raise UserError(f"scheduler {name}: DDPMPipeline does not scale its noise or inputs, as this one needs")
        classes = pipeline.unet.config.num_class_embeds
        labels = {"class_labels": class_ids(prompts, classes, {})} if classes else {}
        return {"batch_size": len(prompts), **labels}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return network(x_t.to(self.network.dtype), time, **condition.tensors, return_dict=False)[0]

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config = self.network.config
        multiple = 2 ** (len(config.block_out_channels) - 1)
        height, width = pipeline_size(height, width, config.sample_size, multiple)
        return config.in_channels, height, width

    def to_latents(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def to_images(self, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5
