"""A pipeline of real architecture without weights: from its JSON files alone, on the meta device."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, index_of, load_pipeline, resolve
from fewstep.samplers.manifest import holds_lora, read_manifest

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def skeleton(source: str | Path, revision: str | None = None) -> Denoiser:
    """The denoiser of a source, every module on the meta device; of a hub id only configs and tokenizers are fetched.

    Raises:
        UserError: whatever is wrong with the source, in one line.
    """
    path = Path(resolve(source))
    if holds_lora(path):
        manifest = read_manifest(path)
        return skeleton(manifest.base, manifest.revision)
    modules: dict[str, Any] = {}
    for name, value in index_of(source, revision).items():
        if isinstance(value, list) and len(value) == 2 and all(value) and name not in LEFT_OUT:
            library, class_name = value
            module = _module(str(path) if path.is_dir() else str(source), name, library, class_name, revision)
            if module is not None:
                modules[name] = module
    return denoiser_of(load_pipeline(source, revision, **modules))


def _module(source: str, name: str, library: str, class_name: str, revision: str | None) -> Any:
    """A component on the meta device; None for one that has no weights."""
    if library not in ("diffusers", "transformers"):
        return None  # of a pipeline's own folder: schedulers
    cls: Any = getattr(importlib.import_module(library), class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        return None
    try:
        if library == "diffusers":
            config = cls.load_config(source, subfolder=name, revision=revision)  # type: ignore[attr-defined]
            with torch.device("meta"):
                return cls.from_config(config)  # type: ignore[attr-defined]
        config = cls.config_class.from_pretrained(source, subfolder=name, revision=revision or "main")  # type: ignore[attr-defined]
        with torch.device("meta"):
            return cls(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{source}: the config of its {name} cannot be read ({lines[0]})") from error
