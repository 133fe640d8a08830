"""The artifact: a student's folder, saved, loaded and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import nn

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import SamplingPlan

MANIFEST = "fewstep.json"
WEIGHTS = "pytorch_lora_weights.safetensors"


class Manifest(BaseModel, extra="forbid"):
    """`fewstep.json`."""

    format: Literal[1] = 1
    base: str = Field(description="the teacher it was made from: folder, embedded:NAME or hub id")
    revision: str | None = None
    pipeline: str = Field(description="class of the diffusers pipeline")
    fingerprint: str = Field(description="of the teacher's weights")
    method: str
    kind: Literal["lora", "full"]
    plans: dict[int, SamplingPlan] = Field(description="by number of steps")
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    def plan(self, steps: int) -> SamplingPlan:
        """The plan of a step count; UserError for one that the student does not declare."""
        if steps not in self.plans:
            raise UserError(f"steps {steps}: this student samples in {', '.join(map(str, sorted(self.plans)))} steps")
        return self.plans[steps]


def fingerprint(denoiser: Denoiser) -> str:
    """Sixteen hex digits that tell one base from another, the same in float32, bfloat16 and float16.

    From the names and shapes of all parameters and the signs of up to 64 entries of each that are far from 0, since
    rounding to a smaller type keeps signs.
    """
    from hashlib import sha256

    digest = sha256()
    for name, network in denoiser.networks.items():
        for key, parameter in base_parameters(network).items():
            flat = parameter.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            signs = (picked.sign() * (picked.abs() > 1e-4)).to(torch.int8)
            digest.update(f"{name}.{key} {tuple(parameter.shape)}".encode() + signs.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_parameters(network: Any) -> dict[str, nn.Parameter]:
    """Parameters of a network by the names they have without adapters."""
    named = network.named_parameters()
    return {k.replace(".base_layer", ""): p for k, p in sorted(named) if ".lora_" not in k}


def save_student(folder: Path, student: Denoiser, manifest: Manifest) -> None:
    """Write the artifact: LoRA weights or a whole pipeline, the scheduler, the manifest and the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    raise NotImplementedError


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a student's folder; UserError where it is none."""
    try:
        return Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
    except (OSError, json.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{folder}: not a student's folder ({type(error).__name__} in {MANIFEST})") from error
