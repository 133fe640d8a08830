"""Students of every family, kind and sort of plan: built, moved away from their teachers, saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.networks import Networks
from fewstep.samplers.card import PROMPTS
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import load
from fewstep.samplers.manifest import Manifest, fingerprint
from fewstep.samplers.plan import SamplingPlan, Step, plan_of_levels, sample, uniform_plan
from fewstep.samplers.student import save_student
from tests.pipelines import (
    tiny_classes,
    tiny_ddpm,
    tiny_dit,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl
from tests.samplers.original import publish

CLIP = {"height": 64, "width": 64, "num_frames": 5}
SIZES = {tiny_wan: CLIP, tiny_flux: {"height": 16, "width": 32}, tiny_sana: {"height": 32, "width": 64}}
"""Where the pipeline's own size is large.

Flux's shift depends on it: at this one the scheduler's float32 rounds the levels as ours. One unit in the last place of
time, 6e-5 radians, is magnified to 1e-4 by random weights.
"""


def lcm(steps: int, guidance: float | None = None) -> SamplingPlan:
    """Levels of LCMScheduler's own grid of 50."""
    levels = [(50 - (i * 50) // steps) / 50 for i in range(steps)]
    return plan_of_levels(levels, rule="consistency", embedded_guidance=guidance)


def renoising(steps: int, guidance_scale: float = 1.0) -> SamplingPlan:
    return uniform_plan(steps, guidance_scale, rule="consistency")


def two_scales(_: int) -> SamplingPlan:
    """Levels on both sides of Wan 2.2's boundary, which is at .9 after a shift by 3, each with its own guidance."""
    steps = [(1, 0.8, 3.0), (0.8, 0.4, 3.0), (0.4, 0, 2.0)]
    return SamplingPlan(steps=tuple(Step(level=a, to=b, guidance_scale=g) for a, b, g in steps), rule="consistency")


def phases(steps: int) -> SamplingPlan:
    """ODE steps, one LoRA for the first half and another for the second."""
    plan = uniform_plan(steps)
    numbered = (step.model_copy(update={"network": int(2 * i >= steps)}) for i, step in enumerate(plan.steps))
    return plan.model_copy(update={"steps": tuple(numbered)})


@dataclass(frozen=True)
class Case:
    """A student to save: its teacher, from a folder or a single file, its kind, and plans by number of steps."""

    build: Callable[..., Any]
    kind: str
    plan: Callable[[int], SamplingPlan]
    steps: tuple[int, ...]
    options: dict[str, Any]
    size: dict[str, int]
    file: bool


def case(
    build: Callable[..., Any],
    kind: str,
    plan: Callable[[int], SamplingPlan],
    *steps: int,
    file: bool = False,
    **options: Any,
) -> Case:
    return Case(build, kind, plan, steps, options, SIZES.get(build, {}), file)


V = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
CASES = {
    "sd-lora": case(tiny_stable_diffusion, "lora", lcm, 1, 2, 4),
    "sd-file-lora": case(tiny_stable_diffusion, "lora", lcm, 2, file=True),
    "sd-phases-lora": case(tiny_stable_diffusion, "lora", phases, 4),
    "sd-full-guidance-input": case(tiny_stable_diffusion, "full", lambda k: lcm(k, 5.0), 1, 2, guidance_input=True),
    "sd-full-odd-levels": case(tiny_stable_diffusion, "full", lambda k: uniform_plan(k, 2.0), 1, 3),
    "sd-v-lora": case(tiny_stable_diffusion, "lora", renoising, 1, 2, 4, **V),
    "sd-v-full": case(tiny_stable_diffusion, "full", lambda k: uniform_plan(k, 2.0), 1, 4, **V),
    "sdxl-lora": case(tiny_stable_diffusion_xl, "lora", lcm, 1, 4),
    "sdxl-full": case(tiny_stable_diffusion_xl, "full", lambda k: uniform_plan(k, 3.0), 1, 4),
    "sd3-lora": case(tiny_stable_diffusion_3, "lora", renoising, 1, 4),
    "sd3-phases-lora": case(tiny_stable_diffusion_3, "lora", phases, 4),
    "sd3-full-dynamic-shift": case(
        tiny_stable_diffusion_3, "full", lambda k: uniform_plan(k, 3.0), 1, 4, dynamic_shift=True
    ),
    "flux-lora": case(tiny_flux, "lora", lambda k: uniform_plan(k, rule="consistency", embedded_guidance=3.5), 1, 4),
    "flux-full-schnell": case(tiny_flux, "full", uniform_plan, 1, 4, guidance_input=False),
    "sana-lora": case(tiny_sana, "lora", renoising, 1, 4),
    "sana-full": case(tiny_sana, "full", lambda k: uniform_plan(k, 3.0), 1, 4),
    "wan-lora": case(tiny_wan, "lora", lambda k: uniform_plan(k, 2.0), 1, 4),
    "wan-file-lora": case(tiny_wan, "lora", lcm, 4, file=True),
    "wan-full": case(tiny_wan, "full", renoising, 1, 2),
    "wan2-lora": case(tiny_wan, "lora", two_scales, 3, two_transformers=True),
    "wan2-phases-lora": case(
        tiny_wan,
        "lora",
        lambda _: plan_of_levels([1, 0.85, 0.69999, 0.34999]),
        4,
        two_transformers=True,
        boundary_ratio=0.875,
    ),  # the third level is the first below the boundary, at 0.7 before the shift by 3
    "wan2-full": case(tiny_wan, "full", uniform_plan, 4, two_transformers=True),
    "dit-lora": case(tiny_dit, "lora", lcm, 1, 4),
    "dit-full": case(tiny_dit, "full", lambda k: uniform_plan(k, 3.0), 1, 4, labels=False),
    "dit-sde-full": case(tiny_dit, "full", lambda k: uniform_plan(k, rule="sde"), 2),
    "pixart-lora": case(tiny_pixart, "lora", renoising, 1, 4),
    "pixart-full": case(tiny_pixart, "full", lambda k: uniform_plan(k, 3.0), 1, 3, sigma=True),
    "classes-lora": case(tiny_classes, "lora", lcm, 1, 4),
    "classes-full": case(tiny_classes, "full", uniform_plan, 1, 4),
    "classes-sde-full": case(tiny_classes, "full", lambda k: uniform_plan(k, rule="sde"), 2, classes=None),
    "ddpm-lora": case(tiny_ddpm, "lora", lcm, 1, 4),
    "ddpm-full": case(tiny_ddpm, "full", uniform_plan, 1, 4),
}


@dataclass(frozen=True)
class Saved:
    """A student's folder, its base's beside it, and what was in memory when it was saved."""

    folder: Path
    base: Path | str
    teacher: Denoiser
    student: Denoiser
    manifest: Manifest


def trained(teacher: Denoiser, kind: str, phase_ends: tuple[float, ...] = ()) -> tuple[Denoiser, Denoiser]:
    """The teacher and a moved student, beside whose LoRA is another role's; alpha is not the rank."""
    networks = Networks(teacher, kind, rank=2, alpha=3)
    roles = [networks.trained(name, phase_ends=phase_ends) for name in ("student", "fake_score")]
    random = torch.Generator().manual_seed(1)
    for role in roles:
        for p in role.parameters.values():
            moved = 0.3 * torch.randn(p.shape, generator=random)
            p.data = moved if kind == "lora" else p.data + moved * p.data.std(correction=0)
    return networks.teacher().denoiser, roles[0].denoiser


def saved(folder: Path, name: str = "sd-lora", base: Path | str | None = None) -> Saved:
    """A case's student in `folder`/student; its base is made in `folder`/base unless given."""
    c = CASES[name]
    if base is None:
        base = folder / "base"
        pipeline = c.build(base, **c.options)
        if c.file:
            base = publish(pipeline, folder)
    loaded = load(base)
    plans = {k: c.plan(k) for k in c.steps}
    manifest = Manifest(
        base=str(base),
        pipeline=type(loaded.pipeline).__name__,
        fingerprint=fingerprint(loaded),
        method="lcm",
        kind=c.kind,  # type: ignore[arg-type]
        plans=plans,
        **c.size,
    )
    teacher, student = trained(loaded, c.kind, manifest.phase_ends)
    save_student(folder / "student", student, manifest)
    return Saved(folder / "student", base, teacher, student, manifest)


def latents(denoiser: Denoiser, manifest: Manifest, steps: int) -> Tensor:
    """Of the card's prompts and seeds."""
    shape = denoiser.latent_shape(manifest.height, manifest.width, manifest.num_frames)
    prompts = list(denoiser.examples or PROMPTS)
    return sample(denoiser.at(shape), denoiser.encode(prompts), manifest.plan(steps), [0, 1], shape)


def snippet_of(folder: Path, steps: int) -> str:
    """The code under the heading of a number of steps, as it stands."""
    text = (folder / "README.md").read_text()
    found = re.search(rf"^### {steps} steps?\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, text
    return found[1]


def scale_weights(module: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)
