"""Phases of the noise levels: where they end, whose turn it is, and jumps to their ends (Phased DMD).

Each has a network of its own, and so has its fake score. What is compared in a phase lies at the levels of its network
alone, so that none is trained by the other's samples.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.objectives.levels import even_levels
from fewstep.distill.objectives.policy import Draws, backward_simulation, step_end
from fewstep.distill.random import Rngs
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import Discrete, NoiseProcess
from fewstep.samplers.plan import SamplingPlan


def fineness(noise: NoiseProcess) -> float:
    """What tells the levels of two networks apart for certain: an entry of a table, or more than rounding does.

    A grid of `sigmas` is exported with six decimals, and stock schedulers count in float32.
    """
    return 1 / noise.n if isinstance(noise, Discrete) else 1e-5


def phase_ends(teacher: Denoiser, config: DistributionMatchingConfig, top: float) -> tuple[float, ...]:
    """Level, before the shift, where each phase but the last ends; none of other policies.

    Of a teacher of several networks right below the boundary of each, a level that the next one takes. Of one network at
    even shares of the steps from `top` down. UserError where steps or levels make no phases.
    """
    c, noise = config, teacher.noise
    if c.policy != "phases":
        return ()
    several = len(teacher.networks) > 1
    count = len(teacher.boundaries) + 1 if several else c.phases
    if count == 1:
        raise UserError("policy phases: nothing says where one of the teacher's networks ends (boundary_ratio)")
    each, rest = divmod(c.steps[0], count)
    if rest:
        raise UserError(f"phases: {count} do not divide {c.steps[0]} steps; choose steps or phases otherwise")
    if not several:
        return tuple(even_levels(noise, c.steps[0], top)[each::each])
    unit = fineness(noise)
    levels = noise.unshift(torch.tensor(teacher.boundaries, dtype=torch.float64)).tolist()
    ends = tuple((round(v / unit) - 1) / round(1 / unit) for v in levels)
    for start, end in pairwise((top, *ends)):
        low, high = max(c.min_level, end + max(c.level_margin, 2 * unit)), min(c.max_level, start)
        if low >= high:
            raise UserError(
                f"policy phases: no level is left to compare scores in the phase from {start:.4g} to {end:.4g}, where a "
                f"network of the teacher ends: max_level {c.max_level:g}, level_margin {c.level_margin:g}"
            )
    return ends


def shares(steps: int, ends: tuple[float, ...]) -> list[range]:
    """Steps of each phase, an equal share."""
    each = steps // (len(ends) + 1)
    return [range(i, i + each) for i in range(0, steps, each)]


def phase_of(iteration: int, count: int, config: DistributionMatchingConfig) -> tuple[int, int]:
    """Number of the phase that an iteration trains, and the iterations since its fake score's warm-up; one phase: 0.

    A function of the iteration alone, so that resume has nothing to carry: an equal share of the run each, with a
    warm-up of its own, or all warm-ups and then turns, one of the student's each.
    """
    c, warmup = config, config.fake_score_warmup_steps
    if c.phase_order == "sequential":
        number = min(iteration * count // c.max_train_steps, count - 1)
        return number, iteration - math.ceil(number * c.max_train_steps / count) - warmup
    since = iteration - count * warmup
    return iteration // warmup if since < 0 else since // c.fake_score_updates % count, since


def phase_draws(
    student: Denoiser,
    condition: Condition,
    plan: SamplingPlan,
    phase: range,
    rng: Rngs,
    shape: tuple[int, ...],
    roles: list[str],
) -> Draws:
    """A jump to the end of a phase, from one of its steps that is drawn once for all samples (Phased DMD).

    Its input is the student's own ODE rollout, through the networks of the phases before, without graph.
    """
    step = phase.start + int(torch.randint(len(phase), (1,), generator=rng.shared("step")))
    x, t = backward_simulation(student, condition, plan, step, rng, shape)
    start, to = (_rows(v, x) for v in (plan.levels[phase[0]], plan.steps[phase[-1]].to))
    # `Denoiser.phased` gives a LoRA what is within 1e-6 of its first level after the shift, too
    gap = 4e-6 if student.phase_ends else 2 * fineness(student.noise)
    return step_end(student, condition, x, t, start, to, "student" in roles, gap=gap)


def _rows(level: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), level, device=x.device)
