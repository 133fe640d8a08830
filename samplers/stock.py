"""A sampling plan in plain diffusers: the stock scheduler, and the arguments that make a stock pipeline follow it.

Nothing is assumed about a scheduler: each candidate is stepped, on a toy network, beside `plan.sample`, and taken
where both agree. What no candidate expresses is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import Discrete, Flow, NoiseProcess
from fewstep.samplers.plan import SamplingPlan, generators, sample
from fewstep.samplers.rules import add_noise, randn

TOLERANCE = 1e-5  # relative; a neighbouring level of a thousand is off by 1e-3

VP_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
FLOW_KEYS = (
    *("num_train_timesteps", "use_dynamic_shifting", "time_shift_type"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
)


@dataclass(frozen=True)
class StockCall:
    """What to give to a stock pipeline, so that it follows one plan.

    Attributes:
        arguments: of the pipeline's call, beside prompt, size and generators.
        set_timesteps: to bind to the scheduler's `set_timesteps`, where the call takes no grid.
        step: to bind to the scheduler's `step`.
        binds_generators: whether the generators are to be bound to `step` too: the pipeline does not pass them on.
        init_noise_sigma: the scheduler's attribute to set, where the first latent is scaled.
        adapters: of phases, the name of the LoRA of each step; the pipeline's `callback_on_step_end` changes it.
    """

    arguments: dict[str, Any]
    set_timesteps: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    binds_generators: bool = False
    init_noise_sigma: float | None = None
    adapters: tuple[str, ...] = ()

    def preparation(self) -> list[str]:
        """Lines of Python between loading `pipe` and calling it with the list `generators`; they need `partial`."""
        lines = []
        if self.init_noise_sigma is not None:
            lines.append(f"pipe.scheduler.init_noise_sigma = {self.init_noise_sigma!r}")
        step = [f"{k}={v!r}" for k, v in self.step.items()] + ["generator=generators"] * self.binds_generators
        for name, bound in (("set_timesteps", [f"{k}={v!r}" for k, v in self.set_timesteps.items()]), ("step", step)):
            if bound:
                lines.append(f"pipe.scheduler.{name} = partial(pipe.scheduler.{name}, {', '.join(bound)})")
        if self.adapters:
            following = {i: b for i, (a, b) in enumerate(pairwise(self.adapters)) if a != b}
            names = ", ".join(f'{i}: "{name}"' for i, name in following.items())
            lines += [
                f'pipe.set_adapters("{self.adapters[0]}")',
                f"following = {{{names}}}  # after which step which LoRA takes over",
                *("", "", "def switch(pipe, step, time, tensors):"),
                *(
                    "    if step in following:",
                    "        pipe.set_adapters(following[step])",
                    "    return tensors",
                    "",
                    "",
                ),
            ]
        return lines


def stock(denoiser: Denoiser, plans: Mapping[int, SamplingPlan]) -> tuple[Any, dict[int, StockCall]]:
    """One diffusers scheduler for all plans of a student, and the call for each number of steps.

    Raises:
        UserError: for a plan that no stock scheduler expresses, saying why.
    """
    if not isinstance(denoiser.noise, Flow | Discrete):
        raise UserError(
            f"noise process {type(denoiser.noise).__name__}: no stock scheduler is known for students of it"
        )
    for steps, plan in plans.items():
        _refuse(steps, plan, denoiser)
    own_size = {"use_resolution_binning": False} if "use_resolution_binning" in _takes(denoiser) else {}
    guidance = {steps: own_size | _guidance(steps, plan, denoiser) for steps, plan in plans.items()}
    expressed: set[int] = set()
    for scheduler in _schedulers(denoiser, plans):
        calls = {}
        for steps, plan in plans.items():
            for call in _calls(denoiser, scheduler, plan):
                if _agree(scheduler, call, denoiser, plan):
                    names = list(denoiser.networks)
                    adapters = tuple(names[s.network] for s in plan.steps) if plan.phase_ends else ()
                    calls[steps] = replace(call, arguments=call.arguments | guidance[steps], adapters=adapters)
                    break
        if len(calls) == len(plans):
            return scheduler, calls
        expressed |= set(calls)
    for steps, plan in plans.items():
        if steps not in expressed:
            levels = ", ".join(f"{v:.6g}" for v in plan.levels)
            advice = "" if isinstance(denoiser.noise, Flow) else "; levels must be multiples of 1/num_train_timesteps"
            raise UserError(
                f"plan of {steps} steps: no stock scheduler of {_class(denoiser)} follows rule {plan.rule} through the "
                f"levels {levels}{advice}"
            )
    firsts = {plan.levels[0] for plan in plans.values()}
    table = isinstance(denoiser.noise, Discrete)
    lost = table and 1.0 in firsts and len(firsts) > 1 and not denoiser.noise.alpha(torch.ones(()))
    advice = (
        "; where nothing of the signal is left, at level 1, all must start or none (init_level below 1)" if lost else ""
    )
    raise UserError(f"plans of {', '.join(map(str, plans))} steps: no one stock scheduler follows them all{advice}")


def _class(denoiser: Denoiser) -> str:
    return type(denoiser.pipeline).__name__


def _takes(denoiser: Denoiser) -> Mapping[str, Any]:
    """Parameters of the pipeline's call."""
    return inspect.signature(type(denoiser.pipeline).__call__).parameters


def _refuse(steps: int, plan: SamplingPlan, denoiser: Denoiser) -> None:
    why = None
    if any(s.told is not None for s in plan.steps):
        why = "tells the network another time than the level's"
    elif plan.phase_ends != denoiser.phase_ends or (plan.phase_ends and "callback_on_step_end" not in _takes(denoiser)):
        why = "changes the student on the way"
    elif plan.rule in ("tcd", "same_noise") and len(plan.steps) > 1:
        why = f"uses rule {plan.rule}"
    elif plan.initial_scale != 1 and (
        isinstance(denoiser.noise, Flow) or not hasattr(denoiser.pipeline, "prepare_extra_step_kwargs")
    ):
        why = f"starts from noise scaled by {plan.initial_scale:g}"
    if why:
        raise UserError(f"plan of {steps} steps: {why}, which no stock scheduler of {_class(denoiser)} does")


def _guidance(steps: int, plan: SamplingPlan, denoiser: Denoiser) -> dict[str, float]:
    """Arguments for classifier-free guidance, or for the network's guidance input."""
    takes, scales = _takes(denoiser), [s.guidance_scale for s in plan.steps]
    where = f"plan of {steps} steps: guidance"
    if "guidance_scale" not in takes:
        if denoiser.takes_prompts and any(s != 1 for s in scales):
            raise UserError(f"{where} {sorted(set(scales))}: {_class(denoiser)} takes none")
        return {}
    if denoiser.takes_guidance or plan.embedded_guidance is not None:
        if not denoiser.takes_guidance:
            raise UserError(f"{where} {plan.embedded_guidance:g} is an input that the student's network does not have")
        if plan.embedded_guidance is None or any(s != 1 for s in scales):
            raise UserError(f"{where} must be the network's input alone (embedded_guidance, and guidance_scale 1)")
        return {"guidance_scale": plan.embedded_guidance}
    if "true_cfg_scale" in takes:  # its guidance_scale is the input that this network lacks
        if any(s != 1 for s in scales):
            raise UserError(
                f"{where} {sorted(set(scales))}: {_class(denoiser)} guides this network by true_cfg_scale only"
            )
        return {}
    groups: dict[str, list[float]] = {"guidance_scale": scales}
    boundary = getattr(denoiser.pipeline.config, "boundary_ratio", None)
    if boundary is not None and "guidance_scale_2" in takes:
        top = denoiser.noise.shift(torch.tensor(plan.levels, dtype=torch.float64)).float() >= boundary
        groups = {
            "guidance_scale": [s for s, high in zip(scales, top, strict=True) if high],
            "guidance_scale_2": [s for s, high in zip(scales, top, strict=True) if not high],
        }
        groups["guidance_scale"] = groups["guidance_scale"] or groups["guidance_scale_2"]
    if any(len(set(g)) > 1 for g in groups.values()):
        raise UserError(f"{where} changes from step to step ({scales}), which {_class(denoiser)} cannot")
    arguments = {name: g[0] for name, g in groups.items() if g}
    first = arguments["guidance_scale"]
    if first < 1 or (first == 1 and any(g != 1 for g in arguments.values())):
        raise UserError(f"{where} {sorted(set(scales))}: {_class(denoiser)} guides only with a guidance_scale above 1")
    if first != 1 and len(plan.steps) > 1 and plan.rule != "ode" and "class_labels" in takes:
        raise UserError(f"{where} {first:g}: {_class(denoiser)} draws noise for twice the rows, and cannot renoise")
    if arguments.get("guidance_scale_2", first) == first:
        arguments.pop("guidance_scale_2", None)  # its default is the other
    return arguments


def _schedulers(denoiser: Denoiser, plans: Mapping[int, SamplingPlan]) -> Iterator[Any]:
    """Candidates, each with the teacher's noise process; the likeliest first."""
    import diffusers

    config, noise = denoiser.pipeline.scheduler.config, denoiser.noise
    rules = {p.rule for p in plans.values() if len(p.steps) > 1}
    if isinstance(noise, Flow):
        kept = {k: config[k] for k in FLOW_KEYS if k in config}
        kept["shift"] = 1.0 if config.get("use_dynamic_shifting") else noise.factor
        yield diffusers.FlowMatchEulerDiscreteScheduler(**kept, stochastic_sampling="consistency" in rules)
        return
    kept = {k: config[k] for k in VP_KEYS if k in config}
    kept |= {"rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False)}
    kept |= {"steps_offset": 1}  # unused by these grids; pipelines complain about another
    clip = {"clip_sample": noise.clip_range is not None, "clip_sample_range": noise.clip_range or 1.0}
    n = kept["num_train_timesteps"]
    # LCM's grid is a choice among multiples of 1/o: the coarsest that has all levels, as its own 50 has
    coarsest = n // math.gcd(n, *(round(n * v) for p in plans.values() for v in p.levels))
    # a large timestep_scaling leaves x0 as it is: by default c_skip mixes in 2e-6 of x_t at t = 0.01
    yield diffusers.LCMScheduler(**kept, **clip, original_inference_steps=coarsest, timestep_scaling=1000.0)
    yield diffusers.DDIMScheduler(**kept, **clip, timestep_spacing="trailing")
    if "timesteps" in _takes(denoiser):  # any levels; but large numbers, inexact, at zero terminal SNR
        yield diffusers.EulerDiscreteScheduler(**kept, timestep_spacing="leading")


def _calls(denoiser: Denoiser, scheduler: Any, plan: SamplingPlan) -> Iterator[StockCall]:
    """Ways to put the scheduler on the plan's levels, the shortest first."""
    takes = _takes(denoiser)
    step, arguments = {}, {}
    if plan.rule == "sde" and "eta" in inspect.signature(scheduler.step).parameters:
        # DDIM at eta = 1; the pipeline's own eta goes before a bound one
        (arguments if "eta" in takes else step)["eta"] = 1.0
        if denoiser.noise.clip_range is not None:
            step["use_clipped_model_output"] = True
    noisy = plan.rule != "ode" and len(plan.steps) > 1
    # pipelines without `prepare_extra_step_kwargs` call `step` without the generators, image-space ones apart
    binds = noisy and not hasattr(denoiser.pipeline, "prepare_extra_step_kwargs") and hasattr(denoiser.pipeline, "vae")
    scale = None if plan.initial_scale == 1 else plan.initial_scale
    own = hasattr(type(scheduler), "init_noise_sigma")  # Euler: a property of its grid, which cannot be set
    base = StockCall(arguments, {}, step, binds, None if own else scale)

    count = {"num_inference_steps": len(plan.steps)}
    yield replace(base, arguments=arguments | count)
    if isinstance(denoiser.noise, Flow):
        grid = {"sigmas": [round(v, 6) for v in plan.levels]}
    else:
        times = denoiser.noise.model_time(torch.tensor(plan.levels, dtype=torch.float64)).tolist()
        whole = all(abs(t - round(t)) < 1e-3 for t in times)
        grid = {"timesteps": [round(t) if whole else round(t, 4) for t in times]}
        if not whole and not hasattr(scheduler, "sigmas"):  # LCM counts in whole ones
            return
    (name,) = grid
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        return
    if name in takes:
        yield replace(base, arguments=arguments | grid)
    elif name == "sigmas":
        yield replace(base, arguments=arguments | count, set_timesteps=grid)
    else:  # LCM takes either, and the pipeline always passes a count
        yield replace(base, arguments=arguments | {"num_inference_steps": None}, set_timesteps=grid)


class _Toy:
    """In place of a denoiser: a raw prediction that depends on x_t and on the time told, bounded."""

    def __init__(self, noise: NoiseProcess):
        self.noise, self.device, self.add_noise = noise, torch.device("cpu"), add_noise

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(x_t) * (1 + time.float() / 1000)

    def guided_x0(self, x_t: Tensor, t: Tensor, *_: Any) -> Tensor:
        return self.noise.x0(self(x_t, self.noise.model_time(t)), x_t, t)


def _agree(scheduler: Any, call: StockCall, denoiser: Denoiser, plan: SamplingPlan) -> bool:
    """Whether the stock loop and ours give the same latents."""
    seeds, shape = [0, 1], (1, 4, 4)
    toy = _Toy(denoiser.noise)
    unguided = plan.model_copy(update={"embedded_guidance": None})
    ours = sample(cast(Denoiser, toy), Condition({}, len(seeds)), unguided, seeds, shape)
    try:
        theirs = _follow(scheduler, call, toy, generators(seeds), shape)
    except (ValueError, IndexError):  # a grid that the scheduler cannot have
        return False
    return bool(torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(ours.abs().max()))))


def _follow(
    scheduler: Any, call: StockCall, toy: _Toy, random: list[torch.Generator], shape: tuple[int, ...]
) -> Tensor:
    """The loop of a stock pipeline."""
    grid = {k: v for k, v in call.arguments.items() if k in ("num_inference_steps", "timesteps", "sigmas")}
    grid = {k: v for k, v in (grid | call.set_timesteps).items() if v is not None}
    if scheduler.config.get("use_dynamic_shifting"):
        factor = cast(Flow, toy.noise).factor
        grid["mu"] = factor if scheduler.config.time_shift_type == "linear" else math.log(factor)
    scheduler.set_timesteps(**grid)
    takes = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in ({"generator": random} | call.arguments | call.step).items() if k in takes}
    scale = call.init_noise_sigma or getattr(scheduler, "init_noise_sigma", 1.0)
    x = randn((len(random), *shape), random) * scale
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(toy(seen, t), t, x, **extra).prev_sample
    return x
