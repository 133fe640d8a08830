"""`DiTPipeline`: class-conditional DiT on ImageNet latents, epsilon with a learned variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.denoisers.class_labels import class_ids, example_labels
from fewstep.samplers.errors import UserError

NULL = 1000
"""The null class, with which the stock pipeline guides whatever the network's number of classes."""


class DiT(Denoiser):
    """Condition: `class_labels` (B,), int64. Prompts are labels; "" is the null class, the negative."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    takes_lora = False

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any):
        super().__init__(pipeline, *args, **kwargs)
        classes = self.network.config.num_embeds_ada_norm
        if classes != NULL:
            raise UserError(f"DiTPipeline: guides with class {NULL}, and this transformer has {classes} classes")
        self.examples = example_labels(NULL, pipeline.labels)
        if pipeline.labels and "id2label" not in pipeline.config:
            # the pipeline would be saved without its names
            names: dict[int, list[str]] = {}
            for name, number in pipeline.labels.items():
                names.setdefault(number, []).append(name)
            pipeline.register_to_config(id2label={number: ", ".join(names[number]) for number in sorted(names)})

    @staticmethod
    def call_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
        if pipeline.scheduler.init_noise_sigma > 1:
            name = type(pipeline.scheduler).__name__
            raise UserError(f"scheduler {name}: DiTPipeline does not scale its first noise, as this one needs")
        return {"class_labels": class_ids(prompts, NULL, pipeline.labels, NULL)}

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        labels = class_ids(prompts, NULL, self.pipeline.labels, NULL)
        return {"class_labels": torch.tensor(labels, device=self.device)}

    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        labels = condition.tensors["class_labels"]
        output = network(x_t.to(self.network.dtype), timestep=time, class_labels=labels, return_dict=False)[0]
        return output[:, : x_t.shape[1]]  # the learned variance follows

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        config, own = self.network.config, self.pixels()
        if (height or own[0], width or own[1]) != own:
            size = f"{height or own[0]}x{width or own[1]}"
            raise UserError(f"size {size}: DiTPipeline samples at its own size alone, {own[0]}x{own[1]}")
        return config.in_channels, config.sample_size, config.sample_size

    def pixels(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        size = self.network.config.sample_size * 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return size, size
