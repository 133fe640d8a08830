"""Pairs (z, x): noise, and where the teacher's own many steps take it. Made before a training, and kept on disk.

Runs share them: they depend on teacher, prompts, precision and `pair_*` keys, not on the seed of a run. Nor are their
noises those of seeds that people, reports and previews sample with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.distill import cache
from fewstep.distill.cache import Rows, StoredConditions
from fewstep.distill.data import DataSet
from fewstep.distill.efficiency import LOWER, autocast
from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.objectives.levels import ends, even_levels, start_scale
from fewstep.distill.random import generator
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.plan import SamplingPlan, generators, plan_of_levels, sample
from fewstep.samplers.rules import randn


class StoredPairs:
    """Pairs by their numbers: `pairs[numbers]` has z and x, (B, C, ...) each, float32, on the CPU.

    Attributes:
        captions: index into the data set's captions, of each pair.
    """

    def __init__(self, rows: Rows, captions: Sequence[int]):
        self.rows, self.captions = rows, list(captions)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return self.rows[numbers]


def teacher_plan(config: DistributionMatchingConfig, teacher: Denoiser) -> SamplingPlan:
    """The teacher's ODE, guided, from the noise that its pipeline starts from, through `pair_steps` even levels and those
    where steps of the student's trajectories end.
    """
    scale = config.guidance_scale if config.pair_guidance_scale is None else config.pair_guidance_scale
    told = {"embedded_guidance": scale} if teacher.takes_guidance else {"guidance_scale": scale}
    levels = sorted({*even_levels(teacher.noise, config.pair_steps), *ends(config, teacher.noise)}, reverse=True)
    return plan_of_levels(levels, initial_scale=start_scale(teacher.noise), **told)


def captions_of_pairs(data: DataSet, n: int) -> list[int]:
    """Index into `data.captions` for each of n pairs: epochs over the samples, each in its own order.

    The first of many pairs are those of few.
    """
    epochs = [torch.randperm(len(data), generator=generator("pairs", e)) for e in range(-(-n // len(data)))]
    draws = [float(torch.rand((), generator=generator("pair caption", i))) for i in range(n)]
    return [data.caption(int(i), u) for i, u in zip(torch.cat(epochs)[:n], draws, strict=True)]


def make_pairs(
    config: DistributionMatchingConfig,
    teacher: Denoiser,
    data: DataSet,
    condition: Condition | StoredConditions,
    shape: tuple[int, ...],
    accelerator: Accelerator,
    say: Callable[[str], None] = lambda line: None,
) -> StoredPairs:
    """`num_pairs` pairs, from the cache or made and cached; processes share the work.

    Args:
        config: the run's.
        teacher: on its device, without adapters.
        data: whose captions are drawn.
        condition: of all its captions.
        shape: of one sample of latents.
        accelerator: which process this is, of how many.
        say: told now and then how far it is.
    """
    plan, captions = teacher_plan(config, teacher), captions_of_pairs(data, config.num_pairs)
    seeds = [generator("pair", i).initial_seed() for i in range(config.num_pairs)]
    by = cache.made_by(teacher, teacher.pipeline.components.keys() - {"vae", "scheduler"})
    kept = ends(config, teacher.noise)
    how = [
        by,
        config.negative_prompt,
        list(shape),
        plan.model_dump(),
        _levels(teacher, plan),
        *([kept] if kept else []),
        *([config.mixed_precision] if config.mixed_precision in LOWER else []),
    ]
    chunks = [range(i, min(i + cache.CHUNK, len(seeds))) for i in range(0, len(seeds), cache.CHUNK)]
    paths = [
        cache.cached(config, "pairs", *how, [data.captions[captions[i]] for i in chunk], [seeds[i] for i in chunk])
        for chunk in chunks
    ]
    spoke = time.monotonic()

    def make(numbers: Sequence[int]) -> None:
        nonlocal spoke
        missing = [n for n in numbers if not cache.whole(paths[n])]
        at_once = max(1, config.train_batch_size // cache.CHUNK)
        for i in range(0, len(missing), at_once):
            group = missing[i : i + at_once]
            rows = [row for number in group for row in chunks[number]]
            told = condition[[captions[i] for i in rows]]
            with autocast(config.mixed_precision, teacher.device):
                made = _pairs(teacher, told, plan, [seeds[i] for i in rows], shape, config.train_batch_size, kept)
            parts = {k: v.split([len(chunks[number]) for number in group]) for k, v in made.items()}
            for place, number in enumerate(group):
                cache.write(paths[number], {k: v[place] for k, v in parts.items()})
            if time.monotonic() - spoke > 10:
                spoke = time.monotonic()
                say(f"pairs: {rows[-1] + 1} of {len(seeds)}")

    make(range(accelerator.process_index, len(chunks), accelerator.num_processes))
    accelerator.wait_for_everyone()
    make(range(len(chunks)))  # what others made is there, unless they have another disk
    n = np.arange(len(seeds))
    return StoredPairs(Rows(paths, n // cache.CHUNK, n % cache.CHUNK), captions)


def _levels(teacher: Denoiser, plan: SamplingPlan) -> list[object]:
    """What a pipeline's scheduler config means to these samples."""
    noise = teacher.noise
    t = noise.shift(torch.tensor([*plan.levels, plan.steps[-1].to], dtype=torch.float64))
    numbers = torch.stack([noise.alpha(t), noise.sigma(t), noise.model_time(t)]).double().tolist()
    return [numbers, noise.prediction_type, noise.clip_range]


def _pairs(
    teacher: Denoiser,
    condition: Condition,
    plan: SamplingPlan,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    batch: int,
    kept: Sequence[float],
) -> dict[str, Tensor]:
    states: dict[float, list[Tensor]] = {level: [] for level in [*kept, plan.steps[-1].to]}

    def keep(step: int, x0: Tensor, x: Tensor) -> None:
        if plan.steps[step].to in states:
            states[plan.steps[step].to].append(x.cpu())

    for i in range(0, len(seeds), batch):
        sample(teacher, condition[i : i + batch], plan, seeds[i : i + batch], shape, callback=keep)
    *between, x = [torch.cat(of) for of in states.values()]
    made = {"z": randn((len(seeds), *shape), generators(seeds)), "x": x}
    return made | ({"between": torch.stack(between, 1)} if between else {})
