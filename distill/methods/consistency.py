"""Consistency distillation in latents: CD, LCM, LCM-LoRA (arXiv:2303.01469, 2310.04378, 2311.05556).

A student f(x_t, t) maps every point of a teacher's trajectory to its clean end. Neighbours t > s on a grid of N levels
must agree: the neighbour is made by one ODE step of the guided teacher, so guidance is folded in.

f is the network's own x0 prediction and f(x, 0) = x by definition. The published c_skip and c_out are 7e-6 and 1 at
the grid's lowest level, and act nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.distill.config import LCMConfig
from fewstep.distill.distiller import Batch, Distiller, Losses, Role
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.levels import start_scale
from fewstep.distill.objectives.robust import pseudo_huber
from fewstep.distill.random import Rngs
from fewstep.samplers import rules
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import expand
from fewstep.samplers.plan import SamplingPlan, plan_of_levels


@dataclass
class Draws:
    """Neighbouring levels s < t, (B,); noise (B, ...); the teacher's guidance scale, one or (B,)."""

    t: Tensor
    s: Tensor
    eps: Tensor
    scale: float | Tensor


class Consistency(Distiller):
    """Mean pseudo-Huber distance of f(x_t, t) and sg[f_target(x_s, s)]."""

    needs = frozenset({"images"})

    def __init__(self, config: LCMConfig, networks: Networks):
        self.config = config
        self.teacher = networks.teacher()
        self.embedded = config.guidance_scale_max is not None or self.teacher.denoiser.takes_guidance
        self.student = networks.trained("student", guidance_input=self.embedded)
        self.target = self.student
        if config.student == "full" and config.target_ema_decay > 0:
            self.target = networks.average("student", config.target_ema_decay)
        self.noise = self.student.denoiser.noise

    def roles(self) -> dict[str, Role]:
        roles = {"teacher": self.teacher, "student": self.student}
        return roles if self.target is self.student else {**roles, "target": self.target}

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Draws:
        assert batch.x0 is not None
        n = self.config.num_ode_steps
        j = rng.integers("level", 1, n + 1)
        t, s = (self.noise.shift(k.double() / n).float() for k in (j, j - 1))
        low, high = self.config.guidance_scale, self.config.guidance_scale_max
        scale = low if high is None else low + (high - low) * rng.uniform("guidance")
        return Draws(t, s, rng.normal("noise", batch.x0.shape[1:]), scale)

    def loss(self, role: str, batch: Batch, draws: Draws, iteration: int) -> Iterator[Losses]:
        assert batch.x0 is not None
        condition = batch.of_images
        assert condition is not None
        t, s = draws.t, draws.s
        told = condition.with_guidance(draws.scale) if self.embedded else condition
        x_t = self.noise.add(batch.x0, draws.eps, t)
        with torch.no_grad():
            x0 = self.teacher.denoiser.guided_x0(x_t, t, condition, draws.scale)
            x_s, _ = rules.ode(x_t, x0, t, s, self.noise)
            f_s = self.target.denoiser.x0(x_s, s, told)
            f_s = torch.where(expand(s == 0, x_s), x_s, f_s)  # f(x, 0) = x
        f_t = self.student.denoiser.x0(x_t, t, told)
        loss = pseudo_huber(f_t, f_s, self.config.huber_c)
        yield Losses(loss, {"loss": loss.detach()})

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(self.config.steps)

    def plan(self, steps: int) -> SamplingPlan:
        """LCMScheduler's own choice among the N trained levels: every (N / steps)-th, from the top, rounded down."""
        if steps not in self.step_counts:
            raise UserError(f"steps {steps}: this student is sampled in {', '.join(map(str, self.step_counts))} steps")
        n = self.config.num_ode_steps
        levels = [(n - (i * n) // steps) / n for i in range(steps)]
        low, high = self.config.guidance_scale, self.config.guidance_scale_max
        guidance = (low if high is None else (low + high) / 2) if self.embedded else None
        scale = start_scale(self.noise)
        return plan_of_levels(levels, rule="consistency", initial_scale=scale, embedded_guidance=guidance)

    def forwards(self) -> dict[str, dict[str, float]]:
        one = self.teacher.denoiser.takes_guidance or (self.config.guidance_scale in (0, 1) and not self.embedded)
        teacher = 1 if one else 2
        return {"student": {"forward": teacher + 1, "backward": 1}}
