"""The tables of `fewstep methods` and `fewstep backbones`, read from the code that they describe."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fewstep.app.cite import BEHIND, PAPERS
from fewstep.distill.config import METHODS, TrainConfig
from fewstep.distill.methods import distiller, why_not
from fewstep.distill.networks import Networks
from fewstep.samplers.load import FAMILIES, family
from fewstep.samplers.noise import Flow


class Outline:
    """In place of a teacher: what methods ask of one, around two networks of one weight, as those of phases have."""

    lora_targets = ()
    takes_guidance = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.networks = {"high": torch.nn.Linear(1, 1), "low": torch.nn.Linear(1, 1)}
        self.noise = Flow()

    def latent_shape(self, *_: Any) -> tuple[int, ...]:
        """Of one sample; nothing is made of it."""
        return (1,)

    def sides(self, time: torch.Tensor) -> dict[str, torch.Tensor]:
        """Half the levels each."""
        high = time >= 500
        return {name: rows for name, rows in (("high", high.nonzero()), ("low", (~high).nonzero())) if len(rows)}

    def with_networks(self, networks: dict[str, Any]) -> Outline:
        """The roles of an outline are its own."""
        return self


def methods() -> list[list[str]]:
    """A row for each method: name, what it needs, what it trains, calls of an iteration at the defaults, papers."""
    table = [["method", "needs", "trains", "forwards / backwards per iteration", "papers (arXiv)"]]
    for name in sorted(METHODS):
        cls = distiller(name)
        config = default(name)
        method: Any = cls(config, Networks(Outline(), "full"))  # type: ignore[call-arg, arg-type]
        trained = ", ".join(role for role, r in method.roles().items() if r.trained)
        costs = [
            f"{c['forward'] + c['backward']:g} / {c['backward']:g}"
            + (f" ({what})" if len(method.forwards()) > 1 else "")
            for what, c in method.forwards().items()
        ]
        behind = ", ".join(PAPERS[key][0] for key in BEHIND[name])
        table.append([name, ", ".join(sorted(cls.needs_of(config))), trained, "; ".join(costs), behind or "-"])
    return table


def backbones() -> list[list[str]]:
    """A row for each pipeline class: networks, the students that are made of it, by which methods, and what it is."""
    table = [["pipeline", "networks", "students", "methods", "what it is"]]
    for name in sorted(FAMILIES):
        cls = family(name)
        about = (importlib.import_module(cls.__module__).__doc__ or "").strip().splitlines()[0]
        about = about.partition(": ")[2].rstrip(".") or about
        students = "LoRA, full" if cls.takes_lora else "LoRA*, full"
        refused = [{m for m in METHODS if why_not(default(m, kind), cls)} for kind in ("full", "lora")]
        without, as_lora, as_full = (
            sorted(m) for m in (refused[0] & refused[1], refused[0] - refused[1], refused[1] - refused[0])
        )
        methods = "all" + (f"; not {', '.join(without)}" if without else "")
        methods += f"; {', '.join(as_lora)} as LoRA alone" if as_lora else ""
        methods += f"; {', '.join(as_full)} with full weights alone" if as_full else ""
        table.append([name, ", ".join(cls.network_names), students, methods, about])
    return table


def default(method: str, student: str = "full") -> TrainConfig:
    """A method's config with nothing chosen."""
    return METHODS[method].model_validate({"method": method, "teacher": "any", "student": student})


def remarks() -> list[str]:
    """What the signs in the table of backbones mean: a line for LoRA*, and one for each reason of a `not`."""
    missing: dict[str, dict[str, None]] = {}
    for name in sorted(FAMILIES):
        for method in sorted(METHODS):
            full, reason = (why_not(default(method, kind), family(name)) for kind in ("full", "lora"))
            if full and reason:
                missing.setdefault(reason, {})[method] = None
    lines = ["LoRA*: the pipeline loads none, so that it is saved added into the weights, and by itself for peft"]
    return lines + [f"not {', '.join(methods)}: {reason}" for reason, methods in missing.items()]
