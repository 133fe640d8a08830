"""The tables of `fewstep methods` and `fewstep backbones`, read from the code that they describe."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewstep.app.cite import BEHIND, PAPERS
from fewstep.distill.config import METHODS, TrainConfig
from fewstep.distill.distiller import Distiller, Role
from fewstep.distill.methods import distiller, why_not
from fewstep.distill.networks import Networks
from fewstep.samplers.adapters import bare
from fewstep.samplers.load import FAMILIES, family
from fewstep.samplers.noise import Flow


class Outline:
    """In place of a teacher: what methods ask of one, around two networks of one weight, as those of phases have."""

    lora_targets = ()
    takes_guidance = False
    device = torch.device("cpu")
    boundaries = (0.5,)
    phase_ends = ()

    def __init__(self) -> None:
        self.networks: dict[str, Any] = {"high": nn.Linear(1, 1), "low": nn.Linear(1, 1)}
        self.noise = Flow()

    def latent_shape(self, *_: Any) -> tuple[int, ...]:
        """Of one sample; nothing is made of it."""
        return (1,)

    def with_networks(self, networks: dict[str, Any]) -> Outline:
        """As of a denoiser."""
        other = copy.copy(self)
        other.networks = networks
        return other


class Outlines(Networks):
    """Roles whose LoRAs are one number each: peft is not needed to count them."""

    def _added(self, name: str) -> dict[str, nn.Parameter]:
        return {f"{network}.lora": nn.Parameter(torch.zeros(1)) for network in self.base.networks}


def outlined(config: TrainConfig) -> Any:
    """The method of a config around an outline of a teacher."""
    return distiller(config.method)(config, Outlines(Outline(), config.student))  # type: ignore[call-arg, arg-type]


def methods() -> list[list[str]]:
    """A row for each method at its defaults; calls of an iteration in which all roles step, and of one of the rest."""
    head = [
        "method",
        "family",
        "networks: full / LoRA",
        "needs",
        "trains",
        "forwards / backwards",
        "without the student",
    ]
    table = [[*head, "papers (arXiv)"]]
    for name in sorted(METHODS):
        cls, config = distiller(name), default(name)
        method = outlined(config)
        trained = ", ".join(role for role, r in method.roles().items() if r.trained)
        costs = [f"{c['forward'] + c['backward']:g} / {c['backward']:g}" for c in method.forwards().values()]
        behind = ", ".join(PAPERS[key][0] for key in BEHIND[name])
        needs = ", ".join(sorted(cls.needs_of(config)))
        table.append(
            [name, family_of(cls), in_memory(name), needs, trained, costs[0], *(costs[1:] or ["-"]), behind or "-"]
        )
    return table


def steps() -> str:
    """The step counts that methods take, those that differ from most named."""
    usual = TrainConfig.step_range
    others = [(n, c.step_range) for n, c in sorted(METHODS.items()) if c.step_range != usual]
    return ", ".join([f"{usual[0]} to {usual[-1]}", *(f"{name} {r[0]} to {r[-1]}" for name, r in others)])


def several() -> str:
    """What `parts` does, and of which methods."""
    takes = [name for name in sorted(METHODS) if getattr(default(name), "policy", "phases") != "phases"]
    return f"parts=P: P students, one after the other in the memory of one, each on its part of the prompts; of {', '.join(takes)}"


def family_of(cls: type[Distiller]) -> str:
    """The loop that a method is a setting of, by the name of its file."""
    loop = cls.mro()[cls.mro().index(Distiller) - 1]
    return loop.__module__.rpartition(".")[2].replace("_", " ")


def in_memory(method: str) -> str:
    """Networks that training holds, in units of the teacher's: with full weights / a base + a LoRA for each further role."""

    def roles(kind: str) -> list[Role]:
        return list(outlined(default(method, kind)).roles().values())

    def held(roles: list[Role]) -> int:
        return len({id(bare(m)) for r in roles for m in r.denoiser.networks.values()}) // len(Outline().networks)

    found = str(held(roles("full")))
    if all(why_not(default(method, "lora"), family(name)) for name in FAMILIES):
        return f"{found} / -"
    loras = roles("lora")
    return f"{found} / {held(loras)} + {sum(r.adapter is not None for r in loras)}"


def backbones() -> list[list[str]]:
    """A row for each pipeline class: its networks and what it is."""
    table = [["pipeline", "networks", "what it is"]]
    for name in sorted(FAMILIES):
        cls = family(name)
        about = (importlib.import_module(cls.__module__).__doc__ or "").strip().splitlines()[0]
        table.append([name, ", ".join(cls.network_names), about.partition(": ")[2].rstrip(".") or about])
    return table


def matrix() -> tuple[list[list[str]], list[str]]:
    """A row for each pipeline class, a column for each method: the students that it makes; and the notes by number.

    A number behind what runs, or behind a dash, is the note that says why the rest does not, or not of every pipeline of the
    class: some have one network where others have two.
    """
    names, notes = sorted(METHODS), dict[str, int]()
    table = [["", *names]]
    for pipeline in sorted(FAMILIES):
        cls = family(pipeline)
        row = [pipeline.removesuffix("Pipeline") + ("" if cls.takes_lora else " *")]
        for method in names:
            reasons = {kind: why_not(default(method, kind.lower()), cls) for kind in ("LoRA", "full")}
            runs = [kind for kind, reason in reasons.items() if reason is None]
            alone = (why_not(default(method, kind.lower()), cls, cls.network_names[:1]) for kind in reasons)
            why = {notes.setdefault(r, len(notes) + 1) for r in (*reasons.values(), *alone) if r}
            row.append(" ".join([*(runs or ["-"]), *([",".join(map(str, sorted(why)))] if why else [])]))
        table.append(row)
    return table, list(notes)


def remarks(notes: Sequence[str]) -> list[str]:
    """Lines below the matrix: what its signs mean."""
    starred = "*: the pipeline loads no LoRA, so that one is saved added into the weights, and by itself for peft"
    return [starred, *(f"{number}: {note}" for number, note in enumerate(notes, 1))]


def default(method: str, student: str = "full") -> TrainConfig:
    """A method's config with nothing chosen."""
    return METHODS[method].model_validate({"method": method, "teacher": "any", "student": student})
