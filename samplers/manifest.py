"""What a student says of itself (`fewstep.json`), and the fingerprint that tells its base from another."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from fewstep.samplers.adapters import bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import SamplingPlan

MANIFEST = "fewstep.json"
WEIGHTS = "pytorch_lora_weights.safetensors"
SAMPLED = 128


class Manifest(BaseModel, extra="forbid"):
    """`fewstep.json`."""

    format: Literal[1] = 1
    base: str = Field(
        description="the teacher it was made from: folder, embedded:NAME, hub id or FILE.safetensors@CONFIG"
    )
    revision: str | None = Field(None, description="of the base, with `variant`")
    variant: str | None = None
    pipeline: str = Field(description="class of the diffusers pipeline")
    fingerprint: str = Field(pattern=r"^[0-9a-f]{16}-[A-Za-z0-9+/]{342}==$", description="of the teacher's weights")
    method: str
    kind: Literal["lora", "full"]
    plans: dict[int, SamplingPlan] = Field(min_length=1, description="by number of steps")
    iteration: int | None = Field(None, description="of its training, that it was made after")
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    parts: int | None = Field(default=None, description="of several students that a router chooses from, in one folder")
    part: int | None = Field(default=None, description="of one of them: which")
    router: str | None = Field(default=None, description="hash of the router that they were trained with")

    @property
    def phase_ends(self) -> tuple[float, ...]:
        """Levels where the next of its LoRAs takes over; none where there is one."""
        return next(iter(self.plans.values())).phase_ends

    def plan(self, steps: int) -> SamplingPlan:
        """The plan of a step count; UserError for one that the student does not declare."""
        if steps not in self.plans:
            raise UserError(f"steps {steps}: this student samples in {', '.join(map(str, sorted(self.plans)))} steps")
        return self.plans[steps]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a student's folder; UserError where it is none."""
    try:
        return Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{folder}: not a student's folder ({type(error).__name__} in {MANIFEST})") from error


def check_weights(folder: Path) -> None:
    """UserError for a student without weights, or with damaged ones: their heads are read, and their sizes compared."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: a student without weights; continue its run with --resume")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged; continue its run with --resume, which writes it again") from error


def holds_lora(folder: str | Path) -> bool:
    """Whether a folder is a student's that needs its base."""
    return (Path(folder) / MANIFEST).is_file() and not (Path(folder) / "model_index.json").is_file()


def fingerprint(denoiser: Denoiser) -> str:
    """Tells one base from another, whatever the type of its weights: see `same_weights`."""
    return fingerprint_of({name: bare(network) for name, network in denoiser.networks.items()})


def fingerprint_of(modules: Mapping[str, nn.Module]) -> str:
    """A hash of the names and shapes of all parameters, and 128 of their entries in half precision, base64.

    Entries, not their hash: rounding to bfloat16 changes a hash. Adapters do not count.
    """
    parameters = {f"{n}.{k}": p for n, m in sorted(modules.items()) for k, p in base_parameters(m).items()}
    names = "".join(f"{k} {tuple(p.shape)}\n" for k, p in parameters.items())
    every = list(parameters.values())
    # spread evenly over the parameters; a large odd stride takes another entry each time where there are few
    picked = [every[i * len(every) // SAMPLED].detach().reshape(-1) for i in range(SAMPLED)]
    entries = torch.stack([p[(7919 * i + 31) % len(p)].float().cpu() for i, p in enumerate(picked)])
    values = base64.b64encode(entries.half().numpy().astype("<f2").tobytes()).decode()
    return f"{sha256(names.encode()).hexdigest()[:16]}-{values}"


def same_weights(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same weights, kept in float32, bfloat16 or float16.

    bfloat16 rounds by at most 1/256 of the value. Any training that moves weights by 1% moves most entries further.
    """
    if a == b:
        return True
    if a.partition("-")[0] != b.partition("-")[0]:
        return False
    x, y = (
        torch.frombuffer(bytearray(base64.b64decode(f.partition("-")[2])), dtype=torch.half).float() for f in (a, b)
    )
    return torch.allclose(x, y, rtol=0.005, atol=1e-7, equal_nan=True)


def base_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a network by the names they have without adapters, sorted."""
    named = {k.replace(".base_layer", ""): p for k, p in network.named_parameters() if ".lora_" not in k}
    return dict(sorted(named.items()))


def weight_files(denoiser: Denoiser) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `pipe.load_lora_weights` for each network or phase of it, one file each."""
    if denoiser.phase_ends:
        return {n: {"weight_name": WEIGHTS.replace(".", f"_{n}.", 1), "adapter_name": n} for n in denoiser.networks}
    first = denoiser.network_names[0]
    return {
        name: {"weight_name": WEIGHTS}
        if name == first
        else {"weight_name": WEIGHTS.replace(".", f"_{name}.", 1), f"load_into_{name}": True}
        for name in denoiser.networks
    }
