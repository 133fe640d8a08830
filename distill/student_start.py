"""Where a full student starts when not as its teacher: a network of another size, or what an earlier run left."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.distiller import Role
from fewstep.distill.memory import call
from fewstep.distill.train_config import TrainConfig
from fewstep.samplers.adapters import bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError, one_line
from fewstep.samplers.load import class_of, load
from fewstep.samplers.several import students_of
from fewstep.samplers.skeleton import skeleton

CLASSES = ("num_class_embeds", "num_embeds_ada_norm")
"""Keys of networks' configs that say how many classes they know."""


def student_start(config: TrainConfig, teacher: Denoiser) -> Denoiser | None:
    """The denoiser that the student starts as, in main memory or, as the teacher, without weights; None: as the teacher.

    Raises:
        UserError: a network that there is not, or that cannot be called in the teacher's place; in one line.
    """
    key = "student_config" if config.student_config is not None else "student_init"
    if getattr(config, key) is None:
        return None
    if config.student == "lora":
        raise UserError(f"{key}: a LoRA is one of the teacher's own network; set student: full")
    if config.student_init is not None:
        start = _loaded(starts_of(config)[0], teacher)
    else:
        start = resized(teacher, config.student_config or {}, config.seed)
    _refuse(config, key, start, teacher)
    return start


def starts_of(config: TrainConfig) -> list[str]:
    """What `student_init` names: a network, or that of each part where it is a run of several students.

    Raises:
        UserError: of other than the config's `parts`.
    """
    source = config.student_init or ""
    several, parts = students_of(source), getattr(config, "parts", 1)
    if several and len(several) != parts:
        held = f"{source} holds {len(several)} students"
        raise UserError(f"config: student_init: {held}, and starts as many; set parts: {len(several)}")
    return [str(path) for path in several] or [source]


def resized(teacher: Denoiser, changes: dict[str, Any], seed: int = 0) -> Denoiser:
    """Networks of another size: random where no weight of the teacher's has the same place and shape (`origins`).

    Args:
        teacher: whose networks they are made like.
        changes: of each network's diffusers config.
        seed: of what is random.
    """
    networks: dict[str, nn.Module] = {}
    for name, network in teacher.networks.items():
        of = bare(network)
        new = _made(of, changes, "meta" if teacher.device.type == "meta" else "cpu", seed)
        given, own = of.state_dict(), new.state_dict()
        with torch.no_grad():
            for key, origin in origins(given, own).items():
                own[key].copy_(given[origin])
        networks[name] = new.requires_grad_(False).eval()
    return teacher.with_networks(networks)


def origins(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, str]:
    """Which of a teacher's weights each of a student's starts as, by names; what is left out has none of its shape.

    The entries of a list of layers are spread evenly: of L entries that become L' the i-th is round(i (L - 1) / (L' - 1)),
    so that first and last stay (MSD's rule for transformers). It also pairs a UNet's layers with fewer `layers_per_block`:
    the last of an upward block, which takes the skip of another width, is the last again.

    Args:
        given: the teacher's tensors, as `state_dict` names them.
        own: the student's.
    """
    lengths = [_lengths(state) for state in (given, own)]
    found = {}
    for key, tensor in own.items():
        parts, origin = key.split("."), list[str]()
        for place, part in enumerate(parts):
            if part.isdecimal():
                # lists inside a moved entry are counted where that entry came from
                before, after = (".".join(names[:place]) for names in (origin, parts))
                many, few = lengths[0].get(before, 0), lengths[1][after]
                part = str(spread(int(part), many, few)) if many else part
            origin.append(part)
        name = ".".join(origin)
        if name in given and given[name].shape == tensor.shape:
            found[key] = name
    return found


def spread(i: int, many: int, few: int) -> int:
    """Entry of a list of `many` that the i-th of `few` is taken from: round(i (many - 1) / (few - 1)), halves up."""
    return (2 * i * (many - 1) + few - 1) // (2 * (few - 1)) if few > 1 else 0


def _lengths(names: Iterable[str]) -> dict[str, int]:
    """Number of entries of each list of modules, by its name."""
    entries: dict[str, set[str]] = {}
    for key in names:
        parts = key.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                entries.setdefault(".".join(parts[:place]), set()).add(part)
    return {name: max(map(int, numbers)) + 1 for name, numbers in entries.items()}


def said(config: TrainConfig, start: Denoiser, teacher: Denoiser) -> str:
    """A line on the student's network: how large it is, and what it starts as."""
    count = total = kept = 0
    for name, network in start.networks.items():
        given, parameters = bare(teacher.networks[name]), dict(network.named_parameters())
        found = origins(given.state_dict(), network.state_dict())
        count += sum(p.numel() for p in parameters.values())
        kept += sum(p.numel() for key, p in parameters.items() if key in found)
        total += sum(p.numel() for p in given.parameters())
    what = config.student_init or f"the teacher's where they fit, {kept / count:.0%} of them"
    return f"student: {count:,} parameters, {count / total:.0%} of the teacher's; they start as {what}"


def _made(of: Any, changes: dict[str, Any], device: str, seed: int) -> Any:
    """A network of the same class and a changed config, its weights random."""
    # what was left to defaults is listed there, and diffusers would drop changes of it
    config = {k: v for k, v in of.config.items() if not k.startswith("_")}
    for key in changes:
        if key not in config:
            near = difflib.get_close_matches(key, config, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(sorted(config))}"
            raise UserError(f"student_config: {type(of).__name__} has no {key}{hint}")
    where = f"student_config: no {type(of).__name__} of it can be made"
    with one_line(where), torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return type(of).from_config({**config, **changes})


def _loaded(source: str, teacher: Denoiser) -> Denoiser:
    """Networks of a run, a student or a pipeline like the teacher's, whose encoders are not loaded again."""
    cls, own = class_of(source), type(teacher.pipeline).__name__
    if cls != own:
        raise UserError(f"student_init: {source} is a {cls}, and the teacher a {own}")
    if teacher.device.type == "meta":
        start = skeleton(source)
    else:
        apart = (*teacher.network_names, "scheduler")
        shared = {k: v for k, v in teacher.pipeline.components.items() if k not in apart and v is not None}
        start = load(source, **shared)
    says = [d.noise.prediction_type for d in (start, teacher)]
    if says[0] != says[1] or type(start.noise) is not type(teacher.noise):
        raise UserError(f"student_init: {source} predicts {says[0]}, and the teacher {says[1]}: one noise is for both")
    if start.networks.keys() != teacher.networks.keys():
        raise UserError(
            f"student_init: {source} has {', '.join(start.networks)}, the teacher {', '.join(teacher.networks)}"
        )
    return teacher.with_networks(start.networks)


def _refuse(config: TrainConfig, key: str, start: Denoiser, teacher: Denoiser) -> None:
    """UserError for what cannot be called in the teacher's place: on the meta device, where a call costs nothing."""
    shape = teacher.latent_shape(config.height, config.width, config.num_frames)
    for name, network in start.networks.items():
        of = bare(teacher.networks[name])
        meta = teacher.with_networks({name: _made(network, {}, "meta", 0)})
        where = f"{key}: {name}"
        for given in CLASSES:
            here, there = (getattr(m.config, given, None) for m in (network, of))
            if here != there:
                raise UserError(f"{where} has {given} {here}, and the teacher's {there}: what goes in must stay")
        if meta.takes_guidance != teacher.takes_guidance:
            raise UserError(f"{where}: both it and the teacher's must take a guidance scale as an input, or none")
        if meta.latent_shape() != teacher.latent_shape():
            raise UserError(f"{where} is for latents {meta.latent_shape()}, and the teacher's {teacher.latent_shape()}")
        with one_line(f"{where} cannot be called as the teacher's is"), torch.no_grad():
            output = call(config, Role(meta), shape, 1)[0]()
        if output.shape != (1, *shape):
            raise UserError(f"{where} makes {tuple(output.shape[1:])} of latents {shape}")
