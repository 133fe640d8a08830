"""Sampling plans: how a student (or a teacher with a first-order solver) goes from noise to an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import Flow
from fewstep.samplers.rules import RULES, clipped, randn

if TYPE_CHECKING:
    from fewstep.samplers.condition import Condition
    from fewstep.samplers.denoisers.base import Denoiser


class Step(BaseModel, extra="forbid", frozen=True):
    """One call of the network. Levels are in [0, 1] BEFORE a flow's shift, so that they suit every resolution."""

    level: float = Field(ge=0, le=1, description="level of the input; 1 = noise")
    to: float = Field(ge=0, le=1, description="level of the output; 0 = clean")
    told: float | None = Field(None, ge=0, le=1, description="level told to the network, if not that of the input")
    guidance_scale: float = Field(1.0, description="classifier-free guidance; 1 = none")
    network: int = Field(0, ge=0, description="which member of a multi-student, or LoRA of a phase, takes this step")


class SamplingPlan(BaseModel, extra="forbid", frozen=True):
    """The steps, the rule between them, and how the first latent starts."""

    steps: tuple[Step, ...] = Field(min_length=1)
    rule: str = Field("ode", description=f"one of {', '.join(RULES)}")
    gamma: float | None = Field(None, ge=0, le=1, description="share of renoising, rule tcd only")
    initial_scale: float = Field(1.0, gt=0, description="factor of the standard normal that sampling starts from")
    embedded_guidance: float | None = Field(None, description="guidance scale that the network takes as an input")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingPlan:
        if self.rule not in RULES:
            raise ValueError(f"rule {self.rule!r} is unknown; allowed: {', '.join(RULES)}")
        if any(s.to >= s.level for s in self.steps):
            raise ValueError("every step must go down: to < level")
        if any(a.to != b.level for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError("every step must start where the one before ended")
        return self

    @property
    def levels(self) -> tuple[float, ...]:
        """Input level of each step, before the shift."""
        return tuple(s.level for s in self.steps)

    @property
    def phase_ends(self) -> tuple[float, ...]:
        """Levels where another member takes over."""
        return tuple(b.level for a, b in pairwise(self.steps) if a.network != b.network)

    @property
    def nfe(self) -> int:
        """Rows through the denoiser for one image: a guided step counts two."""
        return sum(1 if s.guidance_scale in (0.0, 1.0) else 2 for s in self.steps)


def plan_of_levels(levels: Sequence[float], end: float = 0.0, guidance_scale: float = 1.0, **rest: Any) -> SamplingPlan:
    """A plan through decreasing input levels to `end`; the rest are fields of SamplingPlan."""
    ends = [*levels[1:], end]
    steps = [
        Step(level=a, to=b, told=None, guidance_scale=guidance_scale, network=0)
        for a, b in zip(levels, ends, strict=True)
    ]
    return SamplingPlan(steps=tuple(steps), **rest)


def uniform_plan(steps: int, guidance_scale: float = 1.0, **rest: Any) -> SamplingPlan:
    """Levels 1, 1 - 1/K, ..., 1/K: `trailing` spacing of diffusers, the usual grid of flows."""
    return plan_of_levels([1 - i / steps for i in range(steps)], guidance_scale=guidance_scale, **rest)


def plan_of_scheduler(scheduler: Any, denoiser: Denoiser, steps: int, guidance_scale: float = 1.0) -> SamplingPlan:
    """The plan that a stock DDIM, Euler or FlowMatchEuler scheduler follows in its pipeline.

    Raises:
        UserError: for another scheduler; teachers are sampled with it through the stock pipeline.
    """
    name, noise = type(scheduler).__name__, denoiser.noise
    if name == "DDIMScheduler":
        scheduler.set_timesteps(steps)
        times, n = scheduler.timesteps.double(), scheduler.config.num_train_timesteps
        levels = noise.from_model_time(times).tolist()
        if (times[:-1] - n // steps != times[1:]).any():  # it subtracts n // steps whatever comes next
            raise UserError(
                f"DDIMScheduler with {scheduler.config.timestep_spacing} spacing does not start {steps} steps where the "
                f"ones before ended, as a plan must; choose leading, or trailing with a divisor of {n}"
            )
        last = times[-1].item() - n // steps
        end = 0.0 if last < 0 and scheduler.config.set_alpha_to_one else (max(last, 0) + 1) / n
        return plan_of_levels(levels, end, guidance_scale)
    if name == "EulerDiscreteScheduler":
        scheduler.set_timesteps(steps)
        levels = noise.from_model_time(scheduler.timesteps).tolist()
        top = scheduler.sigmas[0].double()  # latents start as init_noise_sigma z in units where alpha is 1
        scale = float(scheduler.init_noise_sigma / (1 + top.square()).sqrt())
        return plan_of_levels(levels, 0.0, guidance_scale, initial_scale=scale)
    if name == "FlowMatchEulerDiscreteScheduler" and isinstance(noise, Flow):
        config, factor = scheduler.config, noise.factor
        mu = factor if config.time_shift_type == "linear" else math.log(factor)
        scheduler.set_timesteps(steps, mu=mu if config.use_dynamic_shifting else None)
        levels = noise.unshift(scheduler.sigmas[:-1].double()).clamp(max=1).tolist()
        rule = "consistency" if config.stochastic_sampling else "ode"
        return plan_of_levels(levels, 0.0, guidance_scale, rule=rule)
    raise UserError(f"{name} is no first-order scheduler with a plan; known: DDIM, EulerDiscrete, FlowMatchEuler")


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, so that an image depends on its own seed alone."""
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def sample(
    denoiser: Denoiser,
    condition: Condition,
    plan: SamplingPlan,
    seeds: Sequence[int],
    latent_shape: tuple[int, ...] | None = None,
    members: Sequence[Denoiser] = (),
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample one latent per seed, (B, C, ...), float32, on the denoiser's device.

    Args:
        denoiser: the network; `members` are the further ones that steps name by `network` >= 1.
        condition: B rows.
        plan: steps, rule and start.
        seeds: B integers; the same seeds in `pipeline(generator=[...])` give the same noise.
        latent_shape: one sample's shape; default: the pipeline's own.
        members: see `denoiser`.
        callback: called after each step with its index, its x0 prediction and where it ends.
    """
    denoisers = [denoiser, *members]
    random = generators(seeds)
    shape = latent_shape or denoiser.latent_shape()
    z = randn((len(random), *shape), random).to(denoiser.device)
    if plan.embedded_guidance is not None:
        condition = condition.with_guidance(plan.embedded_guidance)
    condition = condition.to(denoiser.device)
    rule = RULES[plan.rule] if plan.gamma is None else partial(RULES[plan.rule], gamma=plan.gamma)  # type: ignore[call-arg]
    x = plan.initial_scale * z
    with torch.no_grad():
        for i, step in enumerate(plan.steps):
            d = denoisers[step.network] if members else denoiser  # one of phases knows by the level
            t, s = (d.noise.shift(torch.tensor(v, dtype=torch.float64)) for v in (step.level, step.to))
            told = None if step.told is None else d.noise.shift(torch.tensor(step.told, dtype=torch.float64))
            x0 = d.guided_x0(x, t, condition, step.guidance_scale, told)
            kept, x0 = clipped(x, x0, t, d.noise)
            if plan.rule != "sde":  # diffusers' DDIM keeps the noise of the unclipped prediction, its DDPM does not
                x = kept
            x = d.add_noise(*rule(x, x0, t, s, d.noise, z), random).float() if step.to > 0 else x0.float()
            if callback:
                callback(i, x0, x)
    return x
