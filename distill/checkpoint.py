"""Checkpoints: atomic, verified, safetensors.

A checkpoint is a folder `step-000500` written under another name, synced and renamed; `manifest.json`, written last,
holds the hash of every file. One that does not match its manifest is torn and is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.distill import sharding
from fewstep.samplers.errors import UserError


@contextmanager
def writing(path: Path, hint: str) -> Iterator[None]:
    """Turns a full disk or a read-only folder into one line: what cannot be written, why, and `hint`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own kind, also for a full disk
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({why}); {hint}") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place where the block ends well; what stood there stays otherwise."""
    new = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield new
        sync(new)  # a machine that fails may leave a file of the right length with nothing in it
        os.replace(new, path)
    finally:
        with suppress(OSError):  # a parent that is no folder
            new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replaced(path) as new:
        new.write_text(text)


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Until a file, or a folder's list of them, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint: one file per group of tensors, and `meta` as JSON.

    Of shards the file holds the whole tensors, so that any number of processes reads it; meanwhile all others `share`.

    Raises:
        UserError: where the folder cannot be written or the disk is full; nothing complete is lost.
    """
    final = folder / f"step-{iteration:06d}"
    partial = folder / f".{final.name}.partial"
    with writing(final, "earlier checkpoints are whole"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.partial"):
            shutil.rmtree(left)  # of a run that was killed while it saved
        try:
            _write(partial, iteration, tensors, meta)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)  # torn: training would have gone on from a whole one
        os.replace(partial, final)
        sync(folder)
    return final


def share(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """What the processes that do not write do meanwhile: give their parts of the tensors."""
    for group in tensors.values():
        for value in group.values():
            sharding.whole(value.detach())


def _write(partial: Path, iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    partial.mkdir()
    for name, group in tensors.items():
        # a copy of each: safetensors refuses tensors that share memory
        whole = {k: sharding.whole(v.detach()).cpu().contiguous().clone() for k, v in group.items()}
        save_file(whole, partial / f"{name}.safetensors")
    (partial / "meta.json").write_text(json.dumps({"iteration": iteration, **meta}))
    hashes = {p.name: _digest(p) for p in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(hashes))
    for name in (*hashes, "manifest.json"):
        sync(partial / name)
    sync(partial)


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        hashes = json.loads((checkpoint / "manifest.json").read_text())
        if "meta.json" not in hashes:
            return "incomplete (manifest.json)"
        for name, digest in hashes.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is damaged"
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # a file is missing, or the manifest is no mapping
        return f"incomplete ({type(error).__name__})"
    return None


def iterations(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first, torn or not."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), key=_iteration)


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest(folder: Path, until: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (up to iteration `until`), and a line for each newer one that is torn."""
    said = [f"checkpoint {p}: the run ended while it was written" for p in sorted(folder.glob(".step-*.partial"))]
    for checkpoint in reversed(iterations(folder)):
        if until is not None and _iteration(checkpoint) > until:
            continue
        why = fault(checkpoint)
        if why is None:
            return checkpoint, said
        said.append(f"checkpoint {checkpoint}: {why}; passed over")
    return None, said


def around(folder: Path, iteration: int) -> tuple[Path | None, Path | None]:
    """The newest checkpoint up to an iteration, and the oldest after it; torn or not."""
    found = iterations(folder)
    n = sum(_iteration(checkpoint) <= iteration for checkpoint in found)
    return (found[n - 1] if n else None), (found[n] if n < len(found) else None)


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Groups of tensors and meta of a whole checkpoint."""
    groups = {p.stem: load_file(p) for p in sorted(checkpoint.glob("*.safetensors"))}
    return groups, meta(checkpoint)


def meta(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint holds beside tensors."""
    return json.loads((checkpoint / "meta.json").read_text())


def prune(folder: Path, newest: Path, limit: int, *keep: Path | None) -> None:
    """Delete all but the last `limit` checkpoints up to `newest` and those to `keep`; later ones are torn, and all go."""
    found = iterations(folder)
    last = found.index(newest)
    old = (checkpoint for checkpoint in found[: max(0, last + 1 - limit)] if checkpoint not in keep)
    for checkpoint in (*old, *found[last + 1 :]):
        shutil.rmtree(checkpoint, ignore_errors=True)


def fill(into: dict[str, Tensor], values: dict[str, Tensor], where: Path) -> None:
    """Copy a checkpoint's tensors into those of a run; UserError where they are of another config."""
    if into.keys() != values.keys():
        raise UserError(f"checkpoint {where}: made by another config; start anew under another name=")
    for key, value in into.items():
        value.copy_(sharding.part_of(values[key], value))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors and JSON (whatever is no tensor)."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, entries in state["state"].items():
        # bitsandbytes has its moments of 8 bits in a dict of their own, and takes them back without it
        inner = {k: v for d in entries.values() if isinstance(d, dict) for k, v in d.items()}
        for key, value in ({k: v for k, v in entries.items() if not isinstance(v, dict)} | inner).items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """The inverse of `pack_optimizer`, into an optimiser of the same parameters, sharded or not."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in {**tensors, **meta["plain"]}.items():
        index, key = name.split(".", 1)
        if isinstance(value, Tensor):
            # a copy of each: what was loaded lies in the file, which is pruned while the optimiser still uses it
            like = parameters[int(index)]
            if sharding.is_part(like) and value.shape == like.shape:
                value = sharding.part_of(value, like).clone()
            elif value.shape == like.shape:  # laid out as its parameter, which fused optimisers ask for
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            else:
                value = value.clone()
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": meta["param_groups"]})
