"""A method in a file of your own: a student that says in one call what its teacher says in two, with guidance.

    python examples/own_method.py train_data=FOLDER [key=value ...]

The first stage of guided distillation at one scale (arXiv:2210.03142, section 3.1). FOLDER holds images, each with a caption in a
.txt file of the same name. What a method fills is in docs/add-a-method.md.
"""

import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.distill import load_config, train
from fewstep.distill.config import METHODS
from fewstep.distill.console import answer
from fewstep.distill.distiller import Batch, Distiller, Losses, Role
from fewstep.distill.methods import DISTILLERS
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.levels import many_steps
from fewstep.distill.random import Rngs
from fewstep.distill.train_config import TrainConfig
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import SamplingPlan


class GuidedConfig(TrainConfig, frozen=True):
    """Guided distillation."""

    step_range = range(1, 1001)  # as its teacher
    method: Literal["guided"]
    guidance_scale: float = 7.5


class Guided(Distiller):
    """Mean |o(x_t) - sg[o_u + w (o_c - o_u)]|^2: the student's output, and the teacher's guided by w, at uniform levels."""

    needs = frozenset({"images"})

    def __init__(self, config: GuidedConfig, networks: Networks):
        self.config = config
        self.teacher, self.student = networks.teacher(), networks.trained("student")
        self.noise = self.teacher.denoiser.noise

    def roles(self) -> dict[str, Role]:
        return {"teacher": self.teacher, "student": self.student}

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> tuple[Tensor, Tensor]:
        assert batch.x0 is not None
        return self.noise.shift(1 - rng.uniform("level")), rng.normal("noise", batch.x0.shape[1:])

    def loss(self, role: str, batch: Batch, draws: Any, iteration: int) -> Iterator[Losses]:
        (t, eps), condition = draws, batch.of_images
        assert batch.x0 is not None
        assert condition is not None
        x_t = self.noise.add(batch.x0, eps, t)
        with torch.no_grad():
            target = self.teacher.denoiser.guided_predict(x_t, t, condition, self.config.guidance_scale)
        loss = (self.student.denoiser.predict(x_t, t, condition) - target).square().mean()
        yield Losses(loss, {"loss": loss.detach()})

    @property
    def step_counts(self) -> tuple[int, ...]:
        return (20, 50)

    def plan(self, steps: int) -> SamplingPlan:
        if steps not in self.step_counts:
            raise UserError(f"steps {steps}: this student declares {list(self.step_counts)}")
        return many_steps(self.student.denoiser, steps, 1.0)

    def forwards(self) -> dict[str, dict[str, float]]:
        return {"student": {"forward": 2, "backward": 1}}


METHODS["guided"] = GuidedConfig
DISTILLERS["guided"] = f"{__name__}:Guided"

config = {
    "method": "guided",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "train_data": "images",
    "learning_rate": 1e-4,
    "train_batch_size": 16,
    "max_train_steps": 2000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "guided-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
