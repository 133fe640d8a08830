"""Step policies: on which input the student is trained.

A policy gives the input of the one call that has a graph, and the level of that call. It samples as the plan does, so
that what is trained is what is used. What the call makes is compared at level 0 by all policies here; one whose steps
end at a level s > 0 (trajectory matching, phases) would also say that level, and the method noises on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.distill.random import Rngs
from fewstep.samplers import rules
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.plan import SamplingPlan


def drawn_step(counts: list[int], rng: Rngs) -> tuple[int, int]:
    """Number of steps and index of the trained one, uniform, drawn once for all samples and processes."""
    source = rng.shared("step")
    count = counts[int(torch.randint(len(counts), (1,), generator=source))]
    return count, int(torch.randint(count, (1,), generator=source))


@torch.no_grad()
def backward_simulation(
    student: Denoiser, condition: Condition, plan: SamplingPlan, stop: int, rng: Rngs, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Input of step `stop` (B, ...) and its level (): the live student's own rollout from pure noise (DMD2, section 4.4).

    At stop = 0 it is c z, exactly what sampling starts from: c = 1, or sigma of the level for SiD.
    """
    noise = student.noise
    x = plan.initial_scale * rng.normal("start", shape)
    for i, step in enumerate(plan.steps[:stop]):
        t, s = (noise.shift(torch.tensor(v, device=x.device)) for v in (step.level, step.to))
        x0 = student.x0(x, t, condition)
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
