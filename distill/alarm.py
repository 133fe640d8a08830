"""What stops a run whose student collapses: one alarm that looks at what some methods log, and one at samples of any."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.distill.networks import mean
from fewstep.distill.objectives.divergence import spread
from fewstep.distill.safeguards import few_steps
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import SamplingPlan, sample

if TYPE_CHECKING:
    from fewstep.distill.batches import Batches
    from fewstep.distill.config import TrainConfig
    from fewstep.distill.distiller import Distiller
    from fewstep.distill.record import Record

SHARE = 0.25
"""Of the reference: a spread under it is a collapse."""

WINDOW = 20
"""Student updates over which spread and gap are averaged: a value is of one batch, at one of the rollout's steps."""
PATIENCE = 20
"""Student updates in a row after which a collapse is believed."""

TIMES = 8.0
"""Of the reference: a spread over it is of samples that have come apart. The teacher's few steps may be blurred and narrow."""
ROWS = 4
"""Samples that are looked at; of iterations of fewer rows as many, two at least."""
STEPS = 4
"""A student's samples are of its smallest step count from here on: in one step students start far too narrow or wide."""
LOOKS = 2
"""In a row, after which a collapse is believed: noises and prompt stay the same, so a look has no chance in it."""
BUDGET = 0.01
"""Of a run's calls, what samples may take."""
BACKWARD = 3
"""Calls without graph that one with a graph, and its backward, cost."""


def _collapsed(iteration: int, now: float, before: float, checkpoints: Path, good: int, cure: str = "") -> UserError:
    whole, _ = checkpoint.latest(checkpoints, until=good)
    kept = f"the last good checkpoint is {whole}" if whole else "no checkpoint from before is left"
    return UserError(
        f"iteration {iteration}: the student has collapsed: the spread of its samples is {now:.2g}, of {before:.2g} "
        f"before; {kept}, later ones are of the collapsed student. Try a lower learning_rate{cure}; "
        "collapse_alarm: false trains all the same"
    )


class CollapseAlarm:
    """Watches two scalars that methods log: the student's `spread` over a batch, and the `gap` between the two scores.

    Both are averaged over `WINDOW` student updates. A collapse is a spread under `SHARE` of its reference while the scores
    are further apart than the samples: a student that is right and narrow has no gap. The reference is the teacher's
    own spread, or the highest that the student has reached where that is less, since students may start narrow.
    Where a method logs no spread, or there is no reference, or a batch is a single row, it never says anything, and the
    other alarm is alone.

    Args:
        reference: the teacher's spread; None while there is none.
    """

    def __init__(self, reference: float | None):
        self.reference = reference
        self.window: list[tuple[int, float, float]] = []
        self.highest = 0.0
        self.low = 0
        self.good = 0
        """The last iteration of which later ones prove that its student was well."""

    def look(self, iteration: int, said: Mapping[str, float], checkpoints: Path) -> None:
        """Take in the scalars of an iteration; UserError once the student has collapsed."""
        if self.reference is None or "student/spread" not in said:
            return
        self.window = [
            *self.window[-WINDOW + 1 :],
            (iteration, said["student/spread"], said.get("student/gap", float("inf"))),
        ]
        mean, gap = (sum(values) / len(self.window) for values in list(zip(*self.window, strict=True))[1:])
        if len(self.window) < WINDOW:
            self.good = iteration
            return
        self.highest = max(self.highest, mean)
        reference = min(self.highest, self.reference)
        if mean >= 2 * SHARE * reference:
            self.good = self.window[0][0]
        self.low = self.low + 1 if mean < SHARE * reference and gap >= mean else 0
        if self.low >= PATIENCE:
            raise _collapsed(iteration, mean, reference, checkpoints, self.good, " or more fake_score_updates")

    def keep(self, checkpoints: Path) -> tuple[Path | None, ...]:
        """Checkpoints that must not be pruned: the last one whose student was well, and the one that is next to be known so.

        `good` is a window behind: by then all between would be pruned where they are written faster than that.
        """
        if not self.window:
            return ()
        well, following = checkpoint.around(checkpoints, self.good)
        in_doubt = self.good < self.window[0][0]
        return (well,) if in_doubt else (well, following)

    def state_dict(self) -> dict[str, Any]:
        """What resume needs, as JSON."""
        return {k: v for k, v in vars(self).items() if k != "reference"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        vars(self).update(state)


class SampleAlarm:
    """Looks, every so many iterations, at the spread of a few of the student's samples from noises that stay the same.

    A collapse is a spread under `SHARE` of its reference, or over `TIMES` of it, as that of samples which have come apart
    into noise. The reference is the spread of the teacher's samples, or the highest that the student has reached
    where that is less, and the lowest where that is more: students may start far too narrow or wide.

    Args:
        draw: the student's samples as it is now, (B, C, ...).
        compare: what they are held to; called once.
        every: iterations between two looks.
        record: knows the processes, and where checkpoints are.
        alone: one process can sample: the main one does, and the others wait for what it sees.
    """

    def __init__(
        self,
        draw: Callable[[], Tensor],
        compare: Callable[[], Tensor],
        every: int,
        record: Record,
        alone: bool = True,
    ):
        self.draw, self.compare, self.every, self.record, self.alone = draw, compare, every, record, alone
        self.seen: dict[str, Any] = {}
        """What resume needs, as JSON."""

    def look(self, iteration: int) -> dict[str, float]:
        """What is seen before an iteration (from 0), the same on all processes; UserError once the student has collapsed."""
        if iteration % self.every:
            return {}
        now = self._spread(self.draw)
        if not self.seen:
            reference = self._spread(self.compare)
            self.seen = {"reference": reference, "lowest": now, "highest": now, "bad": 0, "good": 0}
        s = self.seen
        s["lowest"], s["highest"] = min(s["lowest"], now), max(s["highest"], now)
        low, high = min(s["highest"], s["reference"]), max(s["lowest"], s["reference"])
        if SHARE * low <= now <= TIMES * high or s["reference"] == 0:
            s["bad"], s["good"] = 0, iteration
        else:
            s["bad"] += 1
        if s["bad"] >= LOOKS:
            raise _collapsed(iteration, now, low if now < low else high, self.record.checkpoints, s["good"])
        return {"samples/spread": now}

    def _spread(self, draw: Callable[[], Tensor]) -> float:
        accelerator = self.record.accelerator
        draws = accelerator.is_main_process or not self.alone
        value = spread(draw()).to(accelerator.device) if draws else torch.zeros((), device=accelerator.device)
        return mean(accelerator, value).item() * (accelerator.num_processes if self.alone else 1)

    def keep(self) -> tuple[Path | None, ...]:
        """Checkpoints that must not be pruned: the last one whose student was well when it was looked at.

        Whatever the next look finds, it is there; kept from the first doubt on only, it may be gone by then.
        """
        return checkpoint.around(self.record.checkpoints, self.seen["good"])[:1] if self.seen else ()


def _thinned(plan: SamplingPlan) -> SamplingPlan:
    """An ODE of many steps through `STEPS` of its own levels; other plans as they are."""
    n = len(plan.steps)
    if plan.rule != "ode" or n <= STEPS:
        return plan
    kept = [plan.steps[i * n // STEPS] for i in range(STEPS)]
    ends = [*(step.level for step in kept[1:]), plan.steps[-1].to]
    steps = tuple(step.model_copy(update={"to": end}) for step, end in zip(kept, ends, strict=True))
    return plan.model_copy(update={"steps": steps})


def sample_alarm(config: TrainConfig, method: Distiller, batches: Batches, record: Record) -> SampleAlarm | None:
    """The alarm of a run: a handful of seeds under one prompt, held to the teacher's samples of the same.

    A method without a teacher is held to its data, under as many prompts: of one alone it may have a single picture.

    Returns:
        None where the run ends too soon to look `LOOKS` times after its start; it costs nothing then.
    """
    roles, data, at_once = method.roles(), batches.data, config.train_batch_size
    student, teacher = roles["student"].denoiser, roles.get("teacher")
    one = at_once * config.gradient_accumulation_steps  # of an iteration, in each process
    rows = min(max(one * batches.world, 2), ROWS)
    plan = _thinned(method.plan(min((k for k in method.step_counts if k >= STEPS), default=max(method.step_counts))))
    captions = [i for i, caption in enumerate(data.captions) if caption][:rows] or [0]
    captions = captions[:1] * rows if teacher else (captions * rows)[:rows]

    def drawn(denoiser: Denoiser, plan: SamplingPlan) -> Tensor:
        parts = []
        for i in range(0, rows, at_once):  # no more rows than training has: memory
            told, seeds = captions[i : i + at_once], range(config.seed + i, config.seed + min(i + at_once, rows))
            if batches.condition is None:
                condition = denoiser.encode([data.captions[k] for k in told], config.negative_prompt)
            else:
                condition = batches.condition[told]
            parts.append(sample(denoiser, condition, plan, seeds, batches.shape))
        return torch.cat(parts)

    def real() -> Tensor:
        assert batches.latents is not None
        first = data.bucket_of[0]
        return batches.latents[[i for i in range(len(data)) if data.bucket_of[i] == first][:16]]

    compare: Callable[[], Tensor] = real
    looks = (LOOKS + 1) * rows * plan.nfe
    if teacher is not None:
        scale = getattr(config, "guidance_scale", config.validation_guidance_scale or 1.0)
        theirs, _ = few_steps(teacher.denoiser, scale)
        looks += rows * theirs.nfe
        compare = partial(drawn, teacher.denoiser, theirs)
    update = min(c["forward"] + BACKWARD * c["backward"] for c in method.forwards().values())
    # the shortest run that is watched has LOOKS + 1 of them: they and the teacher's samples are within the budget
    every = math.ceil(looks / (LOOKS * BUDGET * update * one))
    if config.max_train_steps <= LOOKS * every:
        return None
    alone = config.sharding_strategy == "no_shard"
    return SampleAlarm(partial(drawn, student, plan), compare, every, record, alone)
