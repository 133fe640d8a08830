"""The artifact: a student's folder. Written here; read by `load.load_student`.

A LoRA student is one safetensors file per network, as the pipeline's own `save_lora_weights` writes it, and the
scheduler that its plans need; a full student, and one of a pipeline that loads no LoRA, is a whole pipeline folder.
Either carries `fewstep.json` and a model card whose snippets run in plain diffusers.
"""

from __future__ import annotations

import base64
import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.samplers.adapters import Adapted, bare
from fewstep.samplers.card import card
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import SamplingPlan
from fewstep.samplers.stock import stock

MANIFEST = "fewstep.json"
WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT = "peft"
SAMPLED = 128


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
    """Keyword arguments of `pipe.load_lora_weights` for each network, one file each."""
    first = denoiser.network_names[0]
    return {
        name: {"weight_name": WEIGHTS}
        if name == first
        else {"weight_name": WEIGHTS.replace(".", f"_{name}.", 1), f"load_into_{name}": True}
        for name in denoiser.networks
    }


def save_student(folder: Path, student: Denoiser, manifest: Manifest) -> None:
    """Write the artifact: LoRA weights or a whole pipeline, the scheduler, the manifest and the model card.

    What stands in `folder` is replaced at the end; a write that fails leaves it as it was. The card quotes
    `config.yaml` beside the folder, where a run has written it.

    Raises:
        UserError: for a plan that no stock scheduler expresses, and where the folder cannot be written.
    """
    folder = Path(folder)
    scheduler, calls = stock(student, manifest.plans)
    if Path(manifest.base).is_dir():
        manifest = manifest.model_copy(update={"base": str(Path(manifest.base).resolve())})
    record = folder.parent / "config.yaml"
    with _replacing(folder) as new:
        if manifest.kind == "lora" and student.takes_lora:
            for name, arguments in weight_files(student).items():
                _save_lora(new, student, name, arguments["weight_name"])
            scheduler.save_pretrained(new / "scheduler")
        else:
            networks = student.networks
            if manifest.kind == "lora":
                for name, network in networks.items():
                    _save_peft(new / PEFT if len(networks) == 1 else new / PEFT / name, *_adapter(network))
                networks = {name: fused(*_adapter(network)) for name, network in networks.items()}
            pipeline = copy.copy(student.pipeline)
            pipeline.register_modules(**networks, scheduler=scheduler)
            pipeline.save_pretrained(new, safe_serialization=True)
        (new / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        config = record.read_text() if record.is_file() else None
        (new / "README.md").write_text(card(student, manifest, scheduler, calls, weight_files(student), config))


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place once the block has ended."""
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("writing", "old"))
    try:
        if old.exists() and not folder.exists():
            old.rename(folder)  # a kill came between the two renames below
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _adapter(network: Any) -> tuple[nn.Module, str]:
    """A network with adapters, and the name of the student's: of several, the one that its view names."""
    if isinstance(network, Adapted):
        assert network.adapter is not None, "the base itself is no student"
        return network.module, network.adapter
    (name,) = network.peft_config
    return network, name


def _lora_state(module: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Weights by `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(module, adapter_name=adapter)
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def _save_lora(folder: Path, student: Denoiser, name: str, weight_name: str) -> None:
    module, adapter = _adapter(student.networks[name])
    config = module.peft_config[adapter].to_dict()  # type: ignore[index, union-attr]
    # without them a loader takes alpha = rank
    kept = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
    metadata = {k: sorted(v) if isinstance(v := config[k], set) else v for k in kept}
    # the loaders take every network's file under the first one's name
    prefix = student.network_names[0]
    layers = {
        f"{prefix}_lora_layers": _lora_state(module, adapter),
        f"{prefix}_lora_adapter_metadata": metadata,
    }
    student.pipeline.save_lora_weights(folder, weight_name=weight_name, safe_serialization=True, **layers)


def _save_peft(folder: Path, module: nn.Module, adapter: str) -> None:
    """What `PeftModel.from_pretrained(base_network, folder)` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = {f"base_model.model.{k}": v for k, v in _lora_state(module, adapter).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(module.peft_config[adapter])  # type: ignore[index, union-attr]
    config.inference_mode = True
    config.save_pretrained(folder)


def fused(module: nn.Module, adapter: str) -> nn.Module:
    """A network of its own with one adapter added into the weights, as large as the base, without any adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items() if ".lora_" not in k}
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A:  # type: ignore[operator]
            weight = state[f"{name}.weight"]
            delta = layer.get_delta_weight(adapter)  # type: ignore[operator]
            state[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    network = type(module).from_config(module.config)  # type: ignore[attr-defined]
    network.load_state_dict(state)
    return network.to(dtype=next(iter(state.values())).dtype).requires_grad_(False).eval()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a student's folder; UserError where it is none."""
    try:
        return Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{folder}: not a student's folder ({type(error).__name__} in {MANIFEST})") from error
