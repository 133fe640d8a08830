"""The artifact: a student's folder. Written here; read by `load.load_student`.

A LoRA student is one safetensors file per network, as the pipeline's own `save_lora_weights` writes it, and the
scheduler that its plans need. A full student is a whole pipeline folder; so is a LoRA student whose pipeline loads no
LoRA, or whose base is itself a LoRA student, with the LoRA added into the weights and apart in `peft/`. Each carries
`fewstep.json` and a model card whose snippets run in plain diffusers.
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.samplers import single_file
from fewstep.samplers.adapters import Adapted
from fewstep.samplers.card import card
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import resolve
from fewstep.samplers.manifest import MANIFEST, Manifest, holds_lora, weight_files
from fewstep.samplers.stock import stock

PEFT = "peft"


def save_student(folder: Path, student: Denoiser, manifest: Manifest) -> None:
    """Write the artifact: LoRA weights or a whole pipeline, the scheduler, the manifest and the model card.

    What stands in `folder` is replaced at the end; a write that fails leaves it as it was.

    Args:
        folder: a run's `student`, or another.
        student: of a LoRA either the adapter's view of a shared base, or networks that have no other adapter.
        manifest: what it says of itself.

    Raises:
        UserError: for a plan that no stock scheduler expresses, and where the folder cannot be written.
    """
    folder = Path(folder)
    scheduler, calls = stock(student, manifest.plans)
    fixed = "height" not in inspect.signature(type(student.pipeline).__call__).parameters
    if fixed and student.latent_shape(manifest.height, manifest.width) != student.latent_shape():
        raise UserError(f"height, width: {manifest.pipeline} samples at its own size alone, {student.pixels()}")
    manifest = manifest.model_copy(update={"base": single_file.absolute(manifest.base)})
    record = folder.parent / "config.yaml"
    config = record.read_text() if folder.name == "student" and record.is_file() else None
    loads = student.takes_lora and not holds_lora(resolve(manifest.base))
    if student.phase_ends and not loads:
        raise UserError(f"{folder}: phases are LoRAs of one pipeline; {manifest.base} is none that loads them")
    files: dict[str, dict[str, Any]] = {}
    with replacing(folder) as new:
        if manifest.kind == "lora" and loads:
            files = weight_files(student)
            for name, arguments in files.items():
                _save_lora(new, student, name, arguments["weight_name"])
            scheduler.save_pretrained(new / "scheduler")
        else:
            networks = student.networks
            if manifest.kind == "lora":
                for name, network in networks.items():
                    save_peft(new / PEFT if len(networks) == 1 else new / PEFT / name, *adapter_of(network))
                networks = {name: fused(*adapter_of(network)) for name, network in networks.items()}
            pipeline = copy.copy(student.pipeline)
            pipeline.register_modules(**networks, scheduler=scheduler)
            pipeline.save_pretrained(new, safe_serialization=True)
        (new / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        (new / "README.md").write_text(card(student, manifest, scheduler, calls, files, config))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
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
    except shutil.Error as error:  # of copytree: every file that failed, with its reason
        raise UserError(f"{folder}: cannot be written ({error.args[0][0][-1]})") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def adapter_of(network: Any) -> tuple[Any, str]:
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
    module, adapter = adapter_of(student.networks[name])
    config = module.peft_config[adapter].to_dict()
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


def save_peft(folder: Path, module: Any, adapter: str) -> None:
    """What `PeftModel.from_pretrained(base_network, folder)` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{k}": v for k, v in _lora_state(module, adapter).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(module.peft_config[adapter])
    config.inference_mode = True
    config.save_pretrained(folder)


def fused(module: Any, adapter: str) -> nn.Module:
    """A network of its own with one adapter added into the weights, as large as the base, without any adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items() if ".lora_" not in k}
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A:  # type: ignore[operator]
            weight = state[f"{name}.weight"]
            delta = layer.get_delta_weight(adapter)  # type: ignore[operator]
            state[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    network = type(module).from_config(module.config)
    network.load_state_dict(state)
    dtype = next(module.parameters()).dtype
    if dtype != torch.float32:
        network.to(dtype=dtype)
    return network.requires_grad_(False).eval()
