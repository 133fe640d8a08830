"""Teacher baselines: the stock diffusers pipeline with a named scheduler. They are no plans (multistep solvers)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.samplers import noise_config
from fewstep.samplers.denoisers.base import rows_at_once
from fewstep.samplers.errors import UserError, reason
from fewstep.samplers.load import family
from fewstep.samplers.plan import generators

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Class in diffusers by name, with the options that make it what the name says; `own` is the pipeline's."""

OF_STUDENTS = ("lcm", "tcd")
"""Those of distilled models: they have their own steps and no spacing."""

SPACINGS = ("trailing", "leading", "linspace")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler runs on the levels of a flow."""
    return noise_config.is_flow(type(scheduler).__name__, scheduler.config)


def has_spacing(scheduler: Any) -> bool:
    """Whether `timestep_spacing` means anything: levels are entries of a table of betas."""
    return "beta_schedule" in scheduler.config and not is_flow(scheduler)


def default_scheduler(own: Any) -> str:
    """The solver that a baseline uses unless told: the best known for these levels at few steps."""
    if not has_spacing(own):
        return "own"
    return "ddim" if own.config.get("clip_sample") else "dpmsolver++"  # DPM-Solver++ cannot clip


def check_scheduler(name: str) -> None:
    """UserError for what is no scheduler's name."""
    if name != "own" and name not in SCHEDULERS:
        raise UserError(f"scheduler {name!r} is unknown; allowed: own, {', '.join(SCHEDULERS)}")


def scheduler_of(own: Any, name: str = "own", spacing: str | None = None) -> Any:
    """A stock scheduler on a pipeline's noise levels.

    Args:
        own: the pipeline's own scheduler.
        name: one of `SCHEDULERS`, or `own`.
        spacing: `timestep_spacing` of diffusers; default: as in `own`. Flows have no such choice.

    Raises:
        UserError: an unknown name or spacing, or one that cannot run on these levels.
    """
    import diffusers

    check_scheduler(name)
    if spacing is not None and spacing not in SPACINGS:
        raise UserError(f"spacing {spacing!r} is unknown; allowed: {', '.join(SPACINGS)}")
    config = dict(own.config)
    flow = is_flow(own)
    options: dict[str, Any] = {"timestep_spacing": spacing} if spacing is not None and has_spacing(own) else {}
    if name == "own":
        return type(own).from_config(config, **options)
    class_name, fixed = SCHEDULERS[name]
    options |= fixed
    shift = noise_config.shift_of(type(own).__name__, config)
    if name == "ddim":  # whose default clips, to a range that latents leave
        options |= {"clip_sample": bool(config.get("clip_sample"))}
    if flow and name in ("ddim", *OF_STUDENTS):
        raise UserError(
            f"scheduler {name}: cannot run on the levels of a flow; allowed: own, dpmsolver++, euler, unipc"
        )
    if flow and name == "euler":
        class_name = "FlowMatchEulerDiscreteScheduler"
        options |= {"shift": shift}  # where other flow schedulers say flow_shift
    elif flow:
        options |= {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    return getattr(diffusers, class_name).from_config(config, **options)


def refuse_steps(scheduler: Any, steps: int) -> None:
    """UserError for more steps than a scheduler has levels."""
    if scheduler.config.get("use_dynamic_shifting"):
        return  # its levels depend on the size, and their number does not end
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"{type(scheduler).__name__}, {steps} steps: {reason(error)}") from error


def refuse_unknown(pipeline: Any, arguments: Iterable[str]) -> None:
    """UserError for names of arguments that the pipeline's call does not have."""
    takes = inspect.signature(pipeline.__call__).parameters
    if unknown := [name for name in arguments if name not in takes]:
        raise UserError(f"{type(pipeline).__name__} takes no {', '.join(unknown)}")


def stock_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    timesteps: Sequence[int] | None = None,
    eta: float | None = None,
    **size: int | None,
) -> Tensor:
    """Images (B, 3, H, W) or clips (B, F, 3, H, W) in 0..1, on the CPU, from the pipeline's own `__call__`.

    Args:
        pipeline: with the scheduler that is wanted; on its device.
        prompts: B prompts, labels of a class-conditional pipeline; an unconditional one ignores them.
        seeds: B seeds, one generator per image: the noise of `plan.sample` with the same seeds.
        steps: of the scheduler.
        guidance_scale: 1 = none.
        negative_prompt: of every row.
        timesteps: instead of the scheduler's own choice, as many as `steps`.
        eta: share of fresh noise in a step of DDIM or TCD, 0 to 1; default: the call's own, 0.
        size: height, width, num_frames where they are not the pipeline's own.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    wanted: dict[str, Any] = {k: v for k, v in size.items() if v is not None}
    if len({"height", "width"} & wanted.keys()) == 1:  # some calls would leave out the one that is given
        pixels = family(type(pipeline).__name__)(pipeline).pixels(wanted.get("height"), wanted.get("width"))
        wanted |= dict(zip(("height", "width"), pixels, strict=True))
    wanted |= family(type(pipeline).__name__).call_arguments(pipeline, prompts)
    wanted["output_type"] = "np" if "batch_size" in wanted else "pt"
    if "guidance_scale" in takes:
        wanted["guidance_scale"] = guidance_scale
        if guidance_scale > 1 and negative_prompt:  # without one SDXL takes zeros, not the embedding of ""
            wanted["negative_prompt"] = [negative_prompt] * len(prompts)
    if timesteps is not None:
        wanted["timesteps"] = list(timesteps)
    if eta is not None:
        wanted["eta"] = eta
    if "use_resolution_binning" in takes:
        wanted["use_resolution_binning"] = False  # the size that was asked, not the nearest of a list
    refuse_unknown(pipeline, wanted)
    if timesteps is not None and "timesteps" not in inspect.signature(pipeline.scheduler.set_timesteps).parameters:
        raise UserError(
            f"timesteps: {type(pipeline.scheduler).__name__} takes none of its own; scheduler lcm or tcd does"
        )
    try:
        with torch.no_grad(), _decoding(pipeline), _one_step(pipeline, steps):
            out = pipeline(generator=generators(seeds), num_inference_steps=steps, **wanted)
    except ValueError as error:  # steps, times and sizes that the pipeline or its scheduler does not take
        raise UserError(f"{type(pipeline).__name__}, {steps} steps: {reason(error)}") from error
    images = out.frames if hasattr(out, "frames") else out.images
    if not isinstance(images, Tensor):
        images = torch.from_numpy(images).movedim(-1, -3)
    return images.float().clamp(0, 1).cpu()


@contextmanager
def _decoding(pipeline: Any) -> Iterator[None]:
    """Within the block the autoencoder takes latents of any type, few rows at a time: it may be in float32 beside others."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return
    decode = vae.decode

    def in_parts(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = [decode(x, *args, **kwargs) for x in z.to(vae.dtype).split(rows_at_once(pipeline, z))]
        if isinstance(parts[0], tuple):  # return_dict=False
            return (torch.cat([part[0] for part in parts]),)
        return replace(parts[0], sample=torch.cat([part.sample for part in parts]))

    vae.decode = in_parts
    try:
        yield
    finally:
        del vae.decode


@contextmanager
def _one_step(pipeline: Any, steps: int) -> Iterator[None]:
    """Within the block a single step of PixArt alpha gives a pair: its call takes the second entry, DMD's clean sample."""
    scheduler = pipeline.scheduler
    own = "step" in vars(scheduler)
    if steps != 1 or type(pipeline).__name__ != "PixArtAlphaPipeline":
        yield
        return
    step = scheduler.step

    @wraps(step)
    def paired(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        return (*found, *found) if isinstance(found, tuple) and len(found) == 1 else found

    scheduler.step = paired
    try:
        yield
    finally:
        del scheduler.step
        if own:
            scheduler.step = step


@contextmanager
def counted(networks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within the block, rows of every call of the networks are appended to the list: their sum over B is the NFE."""
    rows: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        assert isinstance(first, Tensor)
        rows.append(len(first))

    handles = [n.register_forward_pre_hook(note, with_kwargs=True) for n in networks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
