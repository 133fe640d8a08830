"""Distribution matching distillation: DMD2, data-free, by backward simulation (arXiv:2311.18828, 2405.14867).

The student makes a clean sample from its own rollout. Noised to a random level, two denoisers look at it: the teacher
and a fake score that is trained online on the student's samples. Their difference is the gradient of
KL(student || teacher) at that level, up to a positive factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.distill.config import DMD2Config
from fewstep.distill.distiller import Batch, Distiller, Losses, Role
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.divergence import mean_gap, reverse_kl, spread, surrogate
from fewstep.distill.objectives.levels import even_levels, start_scale
from fewstep.distill.random import Rngs
from fewstep.samplers import rules
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import SamplingPlan, plan_of_levels


@dataclass
class Draws:
    """The student's sample (B, ...), with a graph if it steps; a level (B,) and noise (B, ...) for each role's loss."""

    x0: Tensor
    t: dict[str, Tensor]
    eps: dict[str, Tensor]


class DistributionMatching(Distiller):
    """Student: surrogate of (F - R) / mean|x0 - R|; fake score: denoising of the student's samples."""

    needs = frozenset({"prompts"})

    def __init__(self, config: DMD2Config, networks: Networks):
        self.config = config
        self.teacher = networks.teacher()
        self.student = networks.trained("student")
        self.fake_score = networks.trained("fake_score")
        self.noise = self.student.denoiser.noise
        # where the scale is an input of the networks, the student is told the teacher's, and so is its fake score
        self.guidance = config.guidance_scale if self.teacher.denoiser.takes_guidance else None

    def roles(self) -> dict[str, Role]:
        return {"teacher": self.teacher, "student": self.student, "fake_score": self.fake_score}

    def updates(self, iteration: int) -> list[str]:
        since = iteration - self.config.fake_score_warmup_steps
        if since >= 0 and since % self.config.fake_score_updates == 0:
            return ["student", "fake_score"]
        return ["fake_score"]

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Draws:
        x0 = self.rollout(batch, rng, graph="student" in roles)
        low, high = self.config.min_level, self.config.max_level
        t, eps = {}, {}
        for role in roles:
            u = rng.uniform(f"{role} level")
            # the fake score must be right wherever it is asked, and learns all levels but the clean one
            u = low + (high - low) * u if role == "student" else 1 - u
            t[role] = self.noise.shift(u)
            eps[role] = rng.normal(f"{role} noise", x0.shape[1:])
        return Draws(x0, t, eps)

    def rollout(self, batch: Batch, rng: Rngs, graph: bool) -> Tensor:
        """Backward simulation: the live student from pure noise to a step drawn once for all samples; x0 there."""
        assert batch.condition is not None
        condition = batch.condition.with_guidance(self.guidance)
        source = rng.shared("step")
        count = self.config.steps[int(torch.randint(len(self.config.steps), (1,), generator=source))]
        stop = int(torch.randint(count, (1,), generator=source))
        plan = self.plan(count)
        x = x0 = plan.initial_scale * rng.normal("start", batch.shape)
        for i, step in enumerate(plan.steps[: stop + 1]):
            t, s = (self.noise.shift(torch.tensor(v, device=x.device)) for v in (step.level, step.to))
            with torch.set_grad_enabled(graph and i == stop):
                x0 = self.student.denoiser.x0(x, t, condition)
            if i < stop:
                if self.noise.clip_range is not None:  # as sampling does
                    x0 = x0.clamp(-self.noise.clip_range, self.noise.clip_range)
                mean, std = rules.consistency(x, x0, t, s, self.noise)
                x = mean + std * rng.normal(f"rollout {i}", batch.shape)
        return x0

    def loss(self, role: str, batch: Batch, draws: Draws, iteration: int) -> Iterator[Losses]:
        assert batch.condition is not None
        condition = batch.condition.with_guidance(self.guidance)
        t, eps, x0 = draws.t[role], draws.eps[role], draws.x0.detach()
        x_t = self.noise.add(x0, eps, t)
        if role == "fake_score":
            output = self.fake_score.denoiser.predict(x_t, t, condition)
            loss = (output - self.noise.output(x0, eps, t)).square().mean()
            yield Losses(loss, {"loss": loss.detach()})
            return
        with torch.no_grad():
            f = self.fake_score.denoiser.x0(x_t, t, condition)
            r = self.teacher.denoiser.guided_x0(x_t, t, batch.condition, self.config.guidance_scale)
            direction = reverse_kl(r, f) / mean_gap(x0, r)
        loss = surrogate(draws.x0, direction)
        yield Losses(loss, {"loss": loss.detach(), "spread": spread(x0), "gap": (f - r).abs().mean()})

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(sorted(self.config.steps))

    def plan(self, steps: int) -> SamplingPlan:
        if steps not in self.config.steps:
            counts = ", ".join(map(str, self.step_counts))
            raise UserError(f"steps {steps}: this student was trained for {counts} steps")
        levels = even_levels(self.noise, steps)
        scale = start_scale(self.noise)
        return plan_of_levels(levels, rule="consistency", initial_scale=scale, embedded_guidance=self.guidance)

    def forwards(self) -> dict[str, dict[str, float]]:
        c = self.config
        rollout = sum((k - 1) / 2 for k in c.steps) / len(c.steps)
        scores = 1 + (1 if c.guidance_scale in (0, 1) or self.guidance is not None else 2)
        both = {"forward": rollout + scores, "backward": 2}
        return {"student and fake_score": both, "fake_score": {"forward": rollout + 1, "backward": 1}}
