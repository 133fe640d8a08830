"""What ends a run early instead of letting it waste days: a teacher that is sampled wrongly, one whose weights move, and,
in `alarm.py`, a student that collapses. No method knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.distill import sharding
from fewstep.distill.objectives.divergence import spread
from fewstep.samplers.adapters import bare
from fewstep.samplers.baseline import stock_images
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.manifest import base_parameters
from fewstep.samplers.plan import SamplingPlan, sample, uniform_plan
from fewstep.samplers.stock import StockCall, stock

STEPS = 4
DIFFERENCE = 0.01
"""Mean over pixels (0..1) that rounding, also in bfloat16, does not reach."""
ROUNDINGS = 4
"""How much more than one rounding of the condition those of the stock call's latents, one a step, may move an image."""
CONSTANT = 0.01
"""Standard deviation over the pixels (0..1) of an image of one colour, with the noise that a decoder adds."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by its size in bytes."""


def preflight(
    teacher: Denoiser,
    prompts: Sequence[str],
    negative: str,
    scale: float,
    size: tuple[int | None, int | None, int | None] = (None, None, None),
    say: Callable[[str], None] = lambda line: None,
) -> float | None:
    """Sample the teacher through our own denoiser and through its stock pipeline, in few steps from the same noise.

    Args:
        teacher: on its device, every module of the pipeline too; without adapters.
        prompts: of the training; the first two different ones are drawn, of clips the first.
        negative: the negative prompt.
        scale: guidance scale of the training.
        size: height, width, num_frames; None: the pipeline's own.
        say: told why, where there is no comparison with the stock pipeline.

    Returns:
        Spread of the teacher's latents over the batch (`objectives.divergence.spread`), None for a single clip.

    Raises:
        UserError: the two differ, or the images are of one colour, or are not finite.
    """
    shape = teacher.latent_shape(*size)
    chosen = [p for p in dict.fromkeys(prompts) if p][:2] or [""]
    chosen = chosen[:1] if len(shape) == 4 else (chosen * 2)[:2]
    seeds = list(range(len(chosen)))
    plan, scale = few_steps(teacher, scale)
    with torch.no_grad():
        condition = teacher.encode(chosen, negative)
        latents = sample(teacher, condition, plan, seeds, shape)
        images = teacher.decode(latents, batch_size=1)
        try:
            theirs = _stock_samples(teacher.at(shape), plan, chosen, seeds, negative, size)
        except UserError as error:  # the stock call has no such plan, or does not take what it needs
            theirs = None
            say(f"preflight: not compared with the stock pipeline: {error}")
    name, how = type(teacher.pipeline).__name__, f"in {STEPS} steps with guidance {scale:g}"
    cure = "nothing was trained; preflight: false trains all the same"
    if not images.isfinite().all():
        raise UserError(f"teacher: its samples {how} are not finite: look at its dtype and its autoencoder; {cure}")
    if theirs is not None:
        difference = float((images - theirs).abs().mean())
        if difference > DIFFERENCE and teacher.network.dtype != torch.float32:
            # a network of lower precision rounds the stock call's latents too: as much as a rounding moves ours is no fault
            with torch.no_grad():
                moved = sample(teacher, _rounded(condition, teacher.network.dtype), plan, seeds, shape)
                difference -= ROUNDINGS * float((teacher.decode(moved, batch_size=1) - images).abs().mean())
        if not difference <= DIFFERENCE:
            raise UserError(
                f"teacher: its samples {how} differ from those of the stock {name}, by {difference:.2g} of the range on "
                f"average: fewstep calls this pipeline wrongly, please report it; {cure}"
            )
    varied = images.flatten(-2).std(-1).amax(-1)  # (B,) or (B, F), the most varied channel
    if not float(varied.amax()) >= CONSTANT:
        raise UserError(
            f"teacher: its samples {how} are of one colour (pixels vary by {float(varied.amax()):.2g} of the range): look at "
            f"its weights, its dtype and its autoencoder; {cure}"
        )
    return float(spread(latents)) if len(latents) > 1 else None


def few_steps(teacher: Denoiser, scale: float) -> tuple[SamplingPlan, float]:
    """A plan of few steps that its stock pipeline can follow, and its guidance scale."""
    scale = max(scale, 1.0) if teacher.takes_prompts else 1.0  # stock pipelines guide only above 1
    if teacher.takes_guidance:
        return uniform_plan(STEPS, embedded_guidance=scale), scale
    return uniform_plan(STEPS, scale), scale


def _rounded(condition: Condition, dtype: torch.dtype) -> Condition:
    """Every second element, larger by the least step of a type."""
    step = torch.finfo(dtype).eps

    def move(x: Tensor) -> Tensor:
        pattern = torch.arange(x.numel(), device=x.device).reshape(x.shape) % 2
        return x * (1 + step * pattern) if x.is_floating_point() else x

    return replace(condition, tensors={k: move(v) for k, v in condition.tensors.items()})


def _stock_samples(
    teacher: Denoiser,
    plan: SamplingPlan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    negative: str,
    size: Sequence[int | None],
) -> Tensor:
    """The same images from the stock pipeline; UserError where its call cannot follow the plan."""
    scheduler, calls = stock(teacher, {STEPS: plan})
    call = calls[STEPS]
    rest = {k: v for k, v in call.arguments.items() if k not in ("num_inference_steps", "guidance_scale")}
    rest |= dict(zip(("height", "width", "num_frames"), size, strict=True))
    scale = call.arguments.get("guidance_scale", 1.0)
    with _following(teacher.pipeline, scheduler, call):
        return stock_images(teacher.pipeline, prompts, seeds, STEPS, scale, negative, **rest)


@contextmanager
def _following(pipeline: Any, scheduler: Any, call: StockCall) -> Iterator[None]:
    """Within the block the pipeline has the scheduler, bound as `call` says. The ODE draws no noise."""
    own, pipeline.scheduler = pipeline.scheduler, scheduler
    if call.init_noise_sigma is not None:
        scheduler.init_noise_sigma = call.init_noise_sigma
    if call.set_timesteps:
        scheduler.set_timesteps = partial(scheduler.set_timesteps, **call.set_timesteps)
    if call.step:
        scheduler.step = partial(scheduler.step, **call.step)
    try:
        yield
    finally:
        pipeline.scheduler = own


def checksums(denoiser: Denoiser) -> dict[str, int]:
    """A number for each parameter of the networks that changes with any bit of it; adapters do not count.

    The sum of the entries' bits, each times an odd number of its own, modulo 2^64: computed where the weights are.
    """
    found = {}
    for name, network in denoiser.networks.items():
        for key, parameter in base_parameters(bare(network)).items():
            bits = sharding.whole(parameter.detach()).reshape(-1).view(INTEGERS[parameter.element_size()])
            found[f"{name}.{key}"] = sum(
                (part.long() * (2 * torch.arange(len(part), device=part.device) + 2 * i + 1)).sum()
                for i, part in enumerate(bits.split(1 << 22))  # small: as int64 they are wider
            )
    sums = torch.stack([torch.as_tensor(v).cpu() for v in found.values()]).tolist()
    return dict(zip(found, sums, strict=True))


def check_unmoved(before: Mapping[str, int], teacher: Denoiser) -> None:
    """UserError where a weight of the teacher is not what it was."""
    now = checksums(teacher)
    moved = [k for k in before if now.get(k) != before[k]]
    if moved:
        raise UserError(
            f"teacher: {len(moved)} of its {len(before)} weights changed during training, e.g. {moved[0]}: the student "
            "learned from a moving teacher, is not exported and cannot be gone on with. Please report it"
        )
