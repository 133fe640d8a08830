"""The model card of a student: what it is, and snippets that run it in plain diffusers, one for each step count."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from fewstep.samplers import single_file
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.hub import is_hub_id
from fewstep.samplers.load import config_of, index_of, resolve
from fewstep.samplers.manifest import Manifest
from fewstep.samplers.stock import StockCall

PROMPTS = ["a red apple on a blue background", "a cat"]
PIPE = "DiffusionPipeline"


def snippet(
    denoiser: Denoiser,
    manifest: Manifest,
    scheduler: Any,
    call: StockCall,
    weights: Mapping[str, Mapping[str, Any]],
    prompts: list[str],
) -> str:
    """Python that samples the student with diffusers alone, run in the student's folder.

    Args:
        denoiser: of the student's pipeline.
        manifest: the student's.
        scheduler: from `stock`, with `call`, that of one number of steps.
        call: see `scheduler`.
        weights: arguments of `load_lora_weights` for each network or phase; none where the folder is a whole pipeline.
        prompts: to show; ignored by unconditional pipelines.
    """
    preparation = call.preparation()
    bound = ["from functools import partial", ""] if any("partial(" in line for line in preparation) else []
    opening, used = ['pipe = DiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32)'], {"diffusers": {PIPE}}
    if weights:
        opening, used = _base(manifest)
        opening += [_call("pipe.load_lora_weights", '"."', **_coded(w)) for w in weights.values()]
        opening.append(f'pipe.scheduler = {type(scheduler).__name__}.from_pretrained(".", subfolder="scheduler")')
        used["diffusers"].add(type(scheduler).__name__)
    imports = [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(used.items())]
    lines = [*bound, "import torch", *imports, "", *opening]
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")', ""]
    given = denoiser.call_arguments(denoiser.pipeline, prompts)
    rows, count = _coded(given), str(len(prompts))
    for name, variable in (("prompt", "prompts"), ("class_labels", "class_labels")):
        if name in given:
            named = "" if name == "prompt" else f"  # {', '.join(prompts)}"
            lines.append(f"{variable} = {code(given[name])}{named}")
            rows[name], count = variable, f"len({variable})"
    if "batch_size" in rows:
        rows["batch_size"] = count
    lines.append(f"generators = [torch.Generator().manual_seed(seed) for seed in range({count})]  # one for each image")
    lines += preparation
    takes = inspect.signature(type(denoiser.pipeline).__call__).parameters
    sizes = {k: getattr(manifest, k) for k in ("height", "width", "num_frames") if k in takes}
    rows |= _coded({k: v for k, v in sizes.items() if v is not None})
    rows |= {"callback_on_step_end": "switch"} if call.adapters else {}
    called = partial(_call, "pipe", **rows, **_coded(call.arguments), generator="generators")
    if frames := denoiser.frames(manifest.num_frames):
        shown = f"duration={round(1000 / frames[1])}, loop=0"
        lines.append(f"clip, *_ = {called(output_type=code('pil'))}.frames")
        lines.append(f'clip[0].save("clip.gif", save_all=True, append_images=clip[1:], {shown})')
    else:
        lines += [f"image, *_ = {called()}.images", 'image.save("image.png")']
    return "\n".join(lines) + "\n"


def _place(base: str) -> str:
    """Where diffusers finds a base: it knows no `embedded:`, but a student on the hub by its id, on any machine."""
    return base if is_hub_id(base) and not Path(base).exists() else resolve(base)


def _base(manifest: Manifest) -> tuple[list[str], dict[str, set[str]]]:
    """Lines that load the base of a LoRA as `pipe`, and the names they use, by library."""
    files = _coded({k: v for k in ("revision", "variant") if (v := getattr(manifest, k))})
    file = single_file.split(manifest.base)
    if file is None:
        base = code(_place(manifest.base))
        called = _call(f"{PIPE}.from_pretrained", base, **files, torch_dtype="torch.float32")
        return [f"pipe = {called}"], {"diffusers": {PIPE}}
    config, index = code(config_of(manifest.base, manifest.revision)), index_of(manifest.base, manifest.revision)
    import diffusers

    whole = single_file.reads(getattr(diffusers, manifest.pipeline))
    absent, path = single_file.missing(file[0], index), code(file[0])
    lines, used, given = [], {"diffusers": {manifest.pipeline}}, {}
    for name, cls in single_file.modules(index).items():
        subfolder = {"subfolder": code(name), "torch_dtype": "torch.float32"}
        if name in absent:
            lines.append(f"{name} = {_call(f'{cls.__name__}.from_pretrained', config, **files, **subfolder)}")
        elif not whole:
            lines.append(f"{name} = {_call(f'{cls.__name__}.from_single_file', path, config=config, **subfolder)}")
        else:
            continue
        given[name] = name
        used.setdefault(cls.__module__.partition(".")[0], set()).add(cls.__name__)
    if whole:
        called = _call(
            f"{manifest.pipeline}.from_single_file", path, config=config, **given, torch_dtype="torch.float32"
        )
    else:
        called = _call(f"{manifest.pipeline}.from_pretrained", config, **files, **given)
    return [*lines, f"pipe = {called}"], used


def card(
    denoiser: Denoiser,
    manifest: Manifest,
    scheduler: Any,
    calls: Mapping[int, StockCall],
    weights: Mapping[str, Mapping[str, Any]],
    config: str | None = None,
) -> str:
    """The README.md of a student, with the hub's front matter; arguments as in `snippet`, `config` the run's YAML."""
    lora, base, steps = manifest.kind == "lora", _place(manifest.base), sorted(manifest.plans, reverse=True)
    hub = not (Path(base).exists() or single_file.split(base))
    text = "prompt" in inspect.signature(type(denoiser.pipeline).__call__).parameters
    task = "text-to-image" if text else "unconditional-image-generation"  # the hub has no task of classes
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-video" if denoiser.clips else task}
    if hub:  # the hub knows no folders
        front |= {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"}
    front["tags"] = ["fewstep", "distillation", manifest.method, *(["lora"] if lora else [])]
    named = manifest.base if manifest.base.startswith("embedded:") else single_file.called(base)
    counts = ", ".join(map(str, steps[:-1])) + f" or {steps[-1]}" if steps[1:] else str(steps[0])
    plural = "" if steps == [1] else "s"
    lines = [
        *("---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", ""),
        *(f"# {named} in {counts} step{plural}", ""),
        f"A student of `{named}` ({manifest.pipeline}) that samples in {counts} step{plural}: "
        f"{_kind(manifest)}, made by fewstep with the method `{manifest.method}`.",
        *("", "| steps | levels | rule | guidance scale | NFE |", "|---|---|---|---|---|"),
    ]
    for k in steps:
        plan = manifest.plans[k]
        scales = dict.fromkeys(s.guidance_scale for s in plan.steps)
        guidance = (
            ", ".join(f"{s:g}" for s in scales) if plan.embedded_guidance is None else f"{plan.embedded_guidance:g}"
        )
        guidance += "" if plan.embedded_guidance is None else " (an input)"
        levels = (
            ", ".join(f"{v:.4g}" for v in plan.levels) if k <= 8 else f"{plan.levels[0]:.4g} to {plan.levels[-1]:.4g}"
        )
        lines.append(f"| {k} | {levels} | {plan.rule} | {guidance} | {plan.nfe} |")
    lines += [
        *(
            "",
            "A level is 1 for noise and 0 for clean, before any resolution-dependent shift. NFE counts passes of one",
        ),
        *("image through the network: a guided step takes two.", "", "## Run it in plain diffusers", ""),
        'Run in this folder, or put its path or hub id in place of `"."`. One seed gives one sample, whatever the batch.',
        f"Written for diffusers {version('diffusers')}.",
    ]
    prompts = _prompts(denoiser, config)
    for k in steps:
        code = snippet(denoiser, manifest, scheduler, calls[k], weights, prompts)
        lines += ["", f"### {k} step{'' if k == 1 else 's'}", "", "```python", code.rstrip(), "```"]
    if lora and not weights:
        lines += [
            "",
            "The weights here have the LoRA added in. By itself it is in `peft/`, as `peft.PeftModel` reads it.",
        ]
    if config:
        set_values = [line for line in config.splitlines() if not line.endswith(": null")]
        lines += ["", "## How it was made", "", "```yaml", *set_values, "```"]
    lines += [
        *("", "## Licence", ""),
        f"These weights derive from `{named}`: its licence holds for them, and for what they make.",
    ]
    return "\n".join(lines) + "\n"


def _kind(manifest: Manifest) -> str:
    if manifest.kind == "full":
        return "full weights"
    return "a LoRA for each phase of its steps" if manifest.phase_ends else "a LoRA"


def code(value: Any) -> str:
    """A value as Python writes it, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else repr(value)


def _coded(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {k: code(v) for k, v in arguments.items()}


def _call(function: str, *positional: str, **keywords: str) -> str:
    """A call, an argument a line where one line would be long."""
    arguments = [*positional, *(f"{k}={v}" for k, v in keywords.items())]
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= 110:
        return line
    return f"{function}(\n" + "".join(f"    {a},\n" for a in arguments) + ")"


def _prompts(denoiser: Denoiser, config: str | None) -> list[str]:
    shown = (yaml.safe_load(config) or {}).get("validation_prompts") if config else None
    return [str(p) for p in shown[:2]] if shown else list(denoiser.examples or PROMPTS)
