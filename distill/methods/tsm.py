"""Teacher score matching: a network of another size learns what the teacher says at every level (arXiv:2410.23274).

The warm start of a smaller student: its noised inputs are the data's, its target is the teacher's prediction, which is the
mean of what data would ask for and so free of the data's own noise. What comes out is a model of many steps, where
a method of few begins (`student_init`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.distill.config import TSMConfig
from fewstep.distill.distiller import Batch, Losses, Role
from fewstep.distill.methods.pretrain import Draws, ManySteps
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.levels import training_level
from fewstep.distill.random import Rngs
from fewstep.samplers.condition import dropped
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import expand


class TeacherScoreMatching(ManySteps):
    """Mean min(w, limit) |x0_student(x_t) - sg[x0_teacher(x_t)]|^2, with w = |do / dx0|^2 of the prediction type."""

    needs = frozenset({"images", "student_config"})
    config: TSMConfig

    def __init__(self, config: TSMConfig, networks: Networks):
        if networks.kind == "lora":
            raise UserError("method tsm: a network of another size is no LoRA: set student: full")
        self.config = config
        self.teacher = networks.teacher()
        self.student = networks.trained("student")
        self.noise = self.teacher.denoiser.noise

    def roles(self) -> dict[str, Role]:
        return {"teacher": self.teacher, "student": self.student}

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Draws:
        condition = batch.of_images
        assert batch.x0 is not None
        assert condition is not None
        keep = rng.uniform("dropout") >= self.config.prompt_dropout
        t = self.noise.shift(training_level(self.config, rng))
        return Draws(t, rng.normal("noise", batch.x0.shape[1:]), dropped(condition, keep))

    def loss(self, role: str, batch: Batch, draws: Draws, iteration: int) -> Iterator[Losses]:
        assert batch.x0 is not None
        x_t = self.noise.add(batch.x0, draws.eps, draws.t)
        with torch.no_grad():
            target = self.teacher.denoiser.predict(x_t, draws.t, draws.condition)
        error = (self.student.denoiser.predict(x_t, draws.t, draws.condition) - target).square()
        loss = (expand(self.weight(draws.t), error) * error).mean()
        yield Losses(loss, {"loss": loss.detach()})

    def weight(self, t: Tensor) -> Tensor:
        """min(w, limit) / w, (B,): min(w, limit) on the error of x0, said on that of the network's raw output."""
        if self.config.weight_limit is None:
            return torch.ones_like(t)
        x0_per_output = self.noise.x0(torch.ones_like(t), torch.zeros_like(t), t)
        return (self.config.weight_limit * x0_per_output.square()).clamp(max=1)

    def forwards(self) -> dict[str, dict[str, float]]:
        return {"student": {"forward": 1, "backward": 1}}
