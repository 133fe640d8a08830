"""Ordinary training of a denoiser: noise, predict, compare. Makes teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.config import PretrainConfig
from fewstep.distill.distiller import Batch, Distiller, Losses, Role
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.levels import many_steps, training_level
from fewstep.distill.random import Rngs
from fewstep.samplers.condition import Condition, dropped
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import expand
from fewstep.samplers.plan import SamplingPlan


@dataclass
class Draws:
    """Levels (B,), noise (B, ...) and the condition after dropout."""

    t: Tensor
    eps: Tensor
    condition: Condition


class ManySteps(Distiller):
    """What comes out samples as its teacher does; `config` is a DenoisingConfig, each method's own."""

    config: Any
    student: Role

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(self.config.step_counts)

    def plan(self, steps: int) -> SamplingPlan:
        if steps not in self.step_counts:
            raise UserError(f"steps {steps}: this model declares {list(self.step_counts)}")
        return many_steps(self.student.denoiser, steps, self.config.validation_guidance_scale)


class Pretrain(ManySteps):
    """Mean w(t) |o - o*|^2, o* the process's own target for (x0, eps), t uniform or logit-normal (flows: before the shift)."""

    needs = frozenset({"images"})
    config: PretrainConfig

    def __init__(self, config: PretrainConfig, networks: Networks):
        self.config = config
        self.student = networks.trained("student")
        self.noise = self.student.denoiser.noise
        if config.train_text_encoder:
            encoder = self._text_encoder(networks).float().train()
            self.student.modules["text_encoder"] = encoder
            self.student.parameters |= {f"text_encoder.{k}": p for k, p in encoder.named_parameters()}

    def _text_encoder(self, networks: Networks) -> nn.Module:
        encoder = getattr(networks.base.pipeline, "text_encoder", None)
        if encoder is None:
            raise UserError(f"train_text_encoder: {type(networks.base.pipeline).__name__} has no text encoder")
        if networks.kind == "lora":
            raise UserError("train_text_encoder: a LoRA student carries no text encoder; set student: full")
        return encoder

    def roles(self) -> dict[str, Role]:
        return {"student": self.student}

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Draws:
        assert batch.x0 is not None
        keep = (rng.uniform("dropout") >= self.config.prompt_dropout).tolist()
        condition = batch.of_images
        if condition is None:
            prompts = [p if k else self.config.negative_prompt for p, k in zip(batch.prompts, keep, strict=True)]
            condition = self.student.denoiser.encode(prompts, self.config.negative_prompt)
            condition = replace(condition, sizes=batch.size_ids)
        else:
            condition = dropped(condition, torch.tensor(keep, device=batch.x0.device))
        t = self.noise.shift(training_level(self.config, rng))
        return Draws(t, rng.normal("noise", batch.x0.shape[1:]), condition)

    def loss(self, role: str, batch: Batch, draws: Draws, iteration: int) -> Iterator[Losses]:
        assert batch.x0 is not None
        x_t = self.noise.add(batch.x0, draws.eps, draws.t)
        output = self.student.denoiser.predict(x_t, draws.t, draws.condition)
        error = (output - self.noise.output(batch.x0, draws.eps, draws.t)).square()
        loss = (expand(self.weight(draws.t), error) * error).mean()
        yield Losses(loss, {"loss": loss.detach()})

    def weight(self, t: Tensor) -> Tensor:
        """Min-SNR (arXiv:2303.09556): min(SNR, gamma) on the error of x0, said on that of the network's raw output."""
        if self.config.snr_gamma is None:
            return torch.ones_like(t)
        snr = (self.noise.alpha(t) / self.noise.sigma(t)).square()
        x0_per_output = self.noise.x0(torch.ones_like(t), torch.zeros_like(t), t)
        return snr.clamp(max=self.config.snr_gamma) * x0_per_output.square()

    def forwards(self) -> dict[str, dict[str, float]]:
        return {"student": {"forward": 0, "backward": 1}}
