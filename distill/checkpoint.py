"""Checkpoints: atomic, verified, safetensors.

A checkpoint is a folder `step-000500` written under another name, synced and renamed; `manifest.json`, written last,
holds the hash of every file. One that does not match its manifest is torn and is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.samplers.errors import UserError


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint: one file per group of tensors, and `meta` as JSON.

    Raises:
        UserError: where the folder cannot be written or the disk is full; nothing complete is lost.
    """
    final = folder / f"step-{iteration:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, group in tensors.items():
            # a copy of each: safetensors refuses tensors that share memory
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}, partial / f"{name}.safetensors"
            )
        (partial / "meta.json").write_text(json.dumps({"iteration": iteration, **meta}))
        hashes = {p.name: _digest(p) for p in sorted(partial.iterdir())}
        for name in hashes:
            _sync(partial / name)
        (partial / "manifest.json").write_text(json.dumps(hashes))
        _sync(partial / "manifest.json")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final}: cannot be written ({error.strerror or error}); earlier ones are whole"
        ) from error
    return final


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        hashes = json.loads((checkpoint / "manifest.json").read_text())
        for name, digest in hashes.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is damaged"
    except (OSError, json.JSONDecodeError) as error:
        return f"incomplete ({type(error).__name__})"
    return None


def iterations(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first, torn or not."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is torn."""
    said = []
    for checkpoint in reversed(iterations(folder)):
        why = fault(checkpoint)
        if why is None:
            return checkpoint, said
        said.append(f"checkpoint {checkpoint}: {why}; the one before it is used")
    return None, said


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Groups of tensors and meta of a whole checkpoint."""
    groups = {p.stem: load_file(p) for p in sorted(checkpoint.glob("*.safetensors"))}
    return groups, json.loads((checkpoint / "meta.json").read_text())


def prune(folder: Path, limit: int, keep: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never `keep`."""
    for checkpoint in iterations(folder)[:-limit]:
        if checkpoint != keep:
            shutil.rmtree(checkpoint)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors and JSON (whatever is no tensor)."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """The inverse of `pack_optimizer`, into an optimiser of the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **meta["plain"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": meta["param_groups"]})
