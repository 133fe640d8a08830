"""Step policies: on which input the student is trained.

A policy gives the input of the one call that has a graph, and the level of that call. It samples as the plan does, so
that what is trained is what is used. What the call makes is compared at level 0, or, where steps end at a level s > 0
(`Point`), at the point that the `ode` rule reaches there; noising goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.distill.distiller import Pairs
from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.objectives import regression
from fewstep.distill.random import Rngs
from fewstep.samplers import rules
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.plan import SamplingPlan


@dataclass(frozen=True)
class Point:
    """What a step of the student makes, without graph: `x` at level `to`, by its `x0`; compared from there up to `start`.

    x, x0: (B, ...). Levels before the shift, (B,), to < start; `s` is that of x after it. `number`: of the step among those
    of all counts, (B,), or None. `gap`: least distance of compared levels from `to`.
    """

    x: Tensor
    x0: Tensor
    start: Tensor
    to: Tensor
    s: Tensor
    number: Tensor | None = None
    gap: float = 0.0

    def level(self, u: Tensor) -> Tensor:
        """Where it is compared, before the shift, of u in [0, 1]."""
        return torch.maximum(self.to + (self.start - self.to) * u, self.to + self.gap)


@dataclass
class Draws:
    """The student's x0 (B, ...), with a graph if it steps; a level (B,) and noise (B, ...) for each role's loss.

    `point`: what is noised, where that is not x0 but a sample at a lower level. `paired`: of each pair a state x_t of the
    teacher's on the way of the student's steps, its t, and the x0 that takes it to the next.
    `conditions`: what each role is told, where some prompts were emptied; `scale`: the teacher's guidance, where it is
    drawn (B,), or not the config's.
    """

    x0: Tensor
    t: dict[str, Tensor] = field(default_factory=dict)
    eps: dict[str, Tensor] = field(default_factory=dict)
    point: Point | None = None
    paired: tuple[Tensor, Tensor, Tensor] | None = None
    conditions: dict[str, Condition] = field(default_factory=dict)
    scale: float | Tensor | None = None


def compared(x0: Tensor, point: Point | None) -> Tensor:
    """What is noised: where a step ended, or the clean sample."""
    return x0 if point is None else point.x


def drawn_level(config: DistributionMatchingConfig, role: str, rng: Rngs, point: Point | None = None) -> Tensor:
    """Before the shift, (B,). The fake score must be right wherever it is asked: at all levels above the sample's.

    A step's end is compared within the step: there no other step's samples are, and one fake score serves them all.
    """
    c = config
    if c.weighting_scheme == "logit_normal":
        u = (c.logit_mean + c.logit_std * rng.normal(f"{role} level", ())).sigmoid()
    else:
        u = 1 - rng.uniform(f"{role} level") if role == "fake_score" else rng.uniform(f"{role} level")
    if point is None:
        return u if role == "fake_score" else c.min_level + (c.max_level - c.min_level) * u
    if role == "fake_score":
        return point.level(u)
    low, high = (point.to + max(c.level_margin, point.gap)).clamp(min=c.min_level), point.start.clamp(max=c.max_level)
    return low + (high - low) * u


def drawn_step(counts: list[int], rng: Rngs) -> tuple[int, int]:
    """Number of steps and index of the trained one, uniform, drawn once for all samples and processes."""
    source = rng.shared("step")
    count = counts[int(torch.randint(len(counts), (1,), generator=source))]
    return count, int(torch.randint(count, (1,), generator=source))


def drawn_count(counts: list[int], rng: Rngs) -> int:
    """Number of steps, uniform, drawn once for all samples and processes."""
    return counts[int(torch.randint(len(counts), (1,), generator=rng.shared("count")))]


@torch.no_grad()
def backward_simulation(
    student: Denoiser, condition: Condition, plan: SamplingPlan, stop: int, rng: Rngs, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Input of step `stop` (B, ...) and its level (): the live student's own rollout from pure noise (DMD2, section 4.4).

    At stop = 0 it is c z, exactly what sampling starts from: c = 1, or sigma of the level for SiD. By the plan's rule,
    `consistency` or `ode`.
    """
    noise = student.noise
    x = plan.initial_scale * rng.normal("start", shape)
    for i, step in enumerate(plan.steps[:stop]):
        t, s = (noise.shift(torch.tensor(v, device=x.device)) for v in (step.level, step.to))
        x0 = student.x0(x, t, condition)
        if plan.rule == "ode":
            x = jump(x, x0, t, s, noise)
            continue
        if noise.clip_range is not None:  # as sampling does
            x0 = x0.clamp(-noise.clip_range, noise.clip_range)
        mean, std = rules.consistency(x, x0, t, s, noise)
        x = mean + std * rng.normal(f"rollout {i}", shape)
    return x, noise.shift(torch.tensor(plan.steps[stop].level, device=x.device))


def noised_data(x0: Tensor, plan: SamplingPlan, stop: int, rng: Rngs, noise: NoiseProcess) -> tuple[Tensor, Tensor]:
    """Input of step `stop` > 0 (B, ...) and its level (): real latents, noised to it (as NVIDIA's FastGen trains DMD2).

    Cheaper than a rollout, but no input of sampling: there the student sees its own outputs.
    """
    t = noise.shift(torch.tensor(plan.steps[stop].level, device=x0.device))
    return noise.add(x0, rng.normal("start", x0.shape[1:]), t), t


@torch.no_grad()
def trajectory(
    student: Denoiser, condition: Condition, plan: SamplingPlan, rng: Rngs, shape: tuple[int, ...]
) -> Tensor:
    """Inputs of all steps on the live student's own way, by the `ode` rule (TDM), (K, B, ...); the last is not taken."""
    x = plan.initial_scale * rng.normal("start", shape)
    states = [x]
    for step in plan.steps[:-1]:
        t, s = (student.noise.shift(torch.tensor(v, device=x.device)) for v in (step.level, step.to))
        x = jump(x, student.x0(x, t, condition), t, s, student.noise)
        states.append(x)
    return torch.stack(states)


def jump(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: NoiseProcess) -> Tensor:
    """x_s by the `ode` rule, clipped as in sampling; levels after the shift, () or (B,)."""
    return rules.ode(*rules.clipped(x_t, x0, t, noise), t, s, noise)[0]


def chosen(states: Tensor, step: Tensor) -> Tensor:
    """(B, ...) of states (K, B, ...): in row b that of step[b]."""
    return states[step, torch.arange(len(step), device=step.device)]


def step_end(
    student: Denoiser,
    condition: Condition,
    x_t: Tensor,
    t: Tensor,
    start: Tensor,
    to: Tensor,
    graph: bool,
    number: Tensor | None = None,
    gap: float = 0.0,
) -> Draws:
    """The call that is trained, with a graph if the student steps, and where the `ode` rule goes from x_t by it (`Point`)."""
    with torch.set_grad_enabled(graph):
        x0 = student.x0(x_t, t, condition)
    s, made = student.noise.shift(to), x0.detach()
    return Draws(x0, point=Point(jump(x_t, made, t, s, student.noise), made, start, to, s, number, gap))


def trajectory_draws(
    config: DistributionMatchingConfig,
    student: Denoiser,
    condition: Condition,
    plan: SamplingPlan,
    rng: Rngs,
    shape: tuple[int, ...],
    roles: list[str],
) -> Draws:
    """Where a step of the student's own trajectory ends, one for each row; all roles look at the same, each at its level.

    All rows walk to the last step's input, whichever they take: as many calls, and as large, in every process.
    """
    states = trajectory(student, condition, plan, rng, shape)
    starts, ends = (torch.tensor(v, device=states.device) for v in (plan.levels, [p.to for p in plan.steps]))
    step = rng.integers("step", 0, len(plan.steps))
    start = starts[step]
    compared = start if config.separate_levels else starts[0].expand_as(start)
    number = config.steps_before(len(plan.steps)) + step if config.step_conditioned else None
    x_t, t = chosen(states, step), student.noise.shift(start)
    return step_end(student, condition, x_t, t, compared, ends[step], "student" in roles, number)


def paired_step(
    pairs: Pairs, plan: SamplingPlan, between: Sequence[float], rng: Rngs, noise: NoiseProcess
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and x0 of a step of the plan, drawn in each row, on the path of the teacher's ODE (`Draws.paired`).

    `between`: levels of the states that the pairs have on the way.
    """
    states = [plan.initial_scale * pairs.z, *(() if pairs.between is None else pairs.between.unbind(1)), pairs.x]
    path, places = torch.stack(states), [plan.levels[0], *between, plan.steps[-1].to]
    step = rng.integers("pair step", 0, len(plan.steps))

    def row(levels: Sequence[float]) -> tuple[Tensor, Tensor]:
        """State and level of each row."""
        place = torch.tensor([places.index(v) for v in levels], device=step.device)
        return chosen(path, place[step]), noise.shift(torch.tensor(levels, device=step.device)[step])

    (x_t, t), (x_s, s) = row(plan.levels), row([taken.to for taken in plan.steps])
    return x_t, t, regression.held_to(x_t, x_s, t, s, noise)
