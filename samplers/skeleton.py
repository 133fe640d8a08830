"""A pipeline of real architecture without weights: from its JSON files alone, on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.samplers import single_file
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError, reason
from fewstep.samplers.load import config_of, denoiser_of, index_of, load_pipeline, resolve
from fewstep.samplers.manifest import holds_lora, read_manifest


def skeleton(source: str | Path, revision: str | None = None) -> Denoiser:
    """The denoiser of a source, every module on the meta device; of a hub id only configs and tokenizers are fetched.

    Raises:
        UserError: whatever is wrong with the source, in one line.
    """
    path = Path(resolve(source))
    if holds_lora(path):
        manifest = read_manifest(path)
        return skeleton(manifest.base, manifest.revision)
    place = config_of(source, revision)
    modules: dict[str, Any] = {
        name: _module(place, name, cls, revision)
        for name, cls in single_file.modules(index_of(source, revision)).items()
    }
    return denoiser_of(load_pipeline(place, revision, **modules))


def networks(source: str | Path, revision: str | None, names: Iterable[str]) -> list[nn.Module]:
    """Those of a source's components that have one of the names, on the meta device; UserError as for `skeleton`."""
    path = Path(resolve(source))
    if holds_lora(path):
        manifest = read_manifest(path)
        return networks(manifest.base, manifest.revision, names)
    place, classes = config_of(source, revision), single_file.modules(index_of(source, revision))
    return [_module(place, name, classes[name], revision) for name in names if name in classes]


def _module(source: str, name: str, cls: Any, revision: str | None) -> nn.Module:
    """A component on the meta device."""
    try:
        if hasattr(cls, "load_config"):  # of diffusers
            config = cls.load_config(source, subfolder=name, revision=revision)
            with torch.device("meta"):
                return cls.from_config(config)
        config = cls.config_class.from_pretrained(source, subfolder=name, revision=revision or "main")
        with torch.device("meta"):
            return cls(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}: the config of its {name} cannot be read ({reason(error)})") from error
