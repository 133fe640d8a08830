"""Text embeddings and latents, computed once: files of up to 64 rows, named by what made them and from what.

A file is whole or not there, so that an interrupted pass goes on where it was; a changed image or caption costs its own
file. Small caches are held in memory, of larger ones the rows are read as they are asked for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.distill import checkpoint
from fewstep.distill.config import TrainConfig
from fewstep.distill.data import DataSet, refuse_unusable
from fewstep.distill.pictures import Unusable
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser, rows_of
from fewstep.samplers.errors import UserError

CACHE = "~/.cache/fewstep"
CACHE_FORMAT = 2
"""Part of every key: to be raised when the same inputs are to give other tensors, or other files."""
CHUNK = 64
IN_MEMORY = 2 << 30
"""Bytes of embeddings, and of latents, that are held in memory."""


def made_by(denoiser: Denoiser, names: Iterable[str]) -> str:
    """Names what makes cached tensors: the class, and of these components the settings, vocabulary and weights."""
    return digest_of(denoiser.pipeline, names, type(denoiser).__name__)


def digest_of(pipeline: Any, names: Iterable[str], kind: str) -> str:
    """A hash of a word, of a pipeline's own settings, and of those, the vocabulary and the weights of these components.

    Of each tensor up to 4096 entries are read, bit by bit: training moves all of them.
    """
    digest = sha256(kind.encode())
    if labels := getattr(pipeline, "labels", None):  # of classes: what their names mean
        digest.update(json.dumps(labels, sort_keys=True).encode())
    own = {k: v for k, v in getattr(pipeline, "config", {}).items() if isinstance(v, bool | int | float | str)}
    own.pop("requires_safety_checker", None)  # no pipeline here has one
    own = {k: v for k, v in own.items() if not k.startswith("_")}
    if own:  # such as whether an empty negative prompt is zeros, and where one of two networks takes over
        digest.update(json.dumps(own, sort_keys=True).encode())
    for name in sorted(names):
        component = pipeline.components[name]
        if isinstance(component, nn.Module):
            config: Any = component.config
            settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            settings = {k: v for k, v in settings.items() if not k.startswith("_") and "version" not in k}
            digest.update(json.dumps([name, settings], sort_keys=True, default=str).encode())
            for key, value in component.state_dict().items():
                picked = value.reshape(-1)[:: max(1, value.numel() // 4096)].contiguous().cpu()
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(picked.view(torch.uint8).numpy().tobytes())
        elif hasattr(component, "get_vocab"):
            vocabulary = [name, component.model_max_length, component.get_vocab()]
            digest.update(json.dumps(vocabulary, sort_keys=True).encode())
    return digest.hexdigest()


def cached(config: TrainConfig, kind: str, *key: Any) -> Path:
    """The file of what a key, as JSON, names."""
    root = Path(os.path.expanduser(config.cache_dir or CACHE))
    return root / f"{kind}-{sha256(json.dumps([CACHE_FORMAT, *key]).encode()).hexdigest()[:32]}.safetensors"


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file whole or not at all; UserError where it cannot be."""
    from safetensors.torch import save_file

    with checkpoint.writing(path.parent, "set cache_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.replaced(path) as new:
            save_file({k: v.contiguous() for k, v in tensors.items()}, new)


def whole(path: Path) -> bool:
    """Whether a file is there and not torn: its head names its length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def sound(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file; UserError where some are not finite, which a loss would be blamed for."""
    for tensor in tensors.values():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path}: holds numbers that are not finite; delete it, and it is made again (if it comes out the same, "
                "the encoder makes them: try it in float32)"
            )
    return tensors


class Rows:
    """Rows of tensors in files.

    Args:
        paths: of the files.
        file_of: which of them holds each row.
        row_of: at which place.
    """

    def __init__(self, paths: Sequence[Path], file_of: np.ndarray, row_of: np.ndarray):
        from safetensors.torch import load_file

        self.paths, self.file_of, self.row_of = list(paths), file_of, row_of
        small = sum(p.stat().st_size for p in self.paths) <= IN_MEMORY
        self.held = [sound(p, load_file(p)) for p in self.paths] if small else None

    def __len__(self) -> int:
        return len(self.file_of)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows of each tensor, stacked; they must be of one shape."""
        found = [self._row(int(self.file_of[i]), int(self.row_of[i])) for i in rows]
        return {k: torch.stack([row[k] for row in found]) for k in found[0]}

    def _row(self, file: int, row: int) -> dict[str, Tensor]:
        if self.held is not None:
            return {k: v[row] for k, v in self.held[file].items()}
        from safetensors import safe_open

        with safe_open(self.paths[file], "pt") as opened:  # what was mapped is let go with it
            found = {k: opened.get_slice(k)[row : row + 1][0].clone() for k in opened.keys()}  # noqa: SIM118  no mapping
        return sound(self.paths[file], found)


class StoredConditions:
    """Conditions of many captions, read as they are asked for: `conditions[captions]` is a `Condition`."""

    def __init__(self, rows: Rows, negative: dict[str, Tensor]):
        self.rows, self.negative, self.size = rows, negative, len(rows)

    def __getitem__(self, captions: Sequence[int]) -> Condition:
        return Condition(self.rows[captions], len(captions), self.negative)


def conditions(config: TrainConfig, denoiser: Denoiser, captions: Sequence[str]) -> Condition | StoredConditions:
    """Conditions of all captions and the negative prompt, from the cache or computed and cached; on the CPU.

    Args:
        config: for the cache folder and negative prompt.
        denoiser: encodes.
        captions: every caption once.
    """
    encoders = denoiser.pipeline.components.keys() - {"vae", "scheduler", *denoiser.network_names}
    by, negative = made_by(denoiser, encoders), config.negative_prompt
    last = cached(config, "negative", by, negative)
    paths = []
    for i in range(0, len(captions), CHUNK):
        chunk = list(captions[i : i + CHUNK])
        paths.append(cached(config, "text", by, chunk, negative))
        if not whole(paths[-1]) or not whole(last):
            with torch.no_grad():
                part = denoiser.encode(chunk, negative).to("cpu")
            write(last, {k: v[:1] for k, v in part.negative.items()})
            write(paths[-1], part.tensors)
    from safetensors.torch import load_file

    n, unsaid = np.arange(len(captions)), sound(last, load_file(last))
    rows = Rows(paths, n // CHUNK, n % CHUNK)
    if rows.held is None:
        return StoredConditions(rows, unsaid)
    tensors = {k: torch.cat([part[k] for part in rows.held]) for k in rows.held[0]}
    return Condition(tensors, len(captions), unsaid)


class Latents:
    """Latents of a data set's images or clips: `latents[samples]`, of one bucket, is (B, C, ...), float32, on the CPU."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __getitem__(self, samples: Sequence[int]) -> Tensor:
        return self.rows[samples]["latents"]


def latents(
    config: TrainConfig, denoiser: Denoiser, data: DataSet, say: Callable[[str], None] = lambda line: None
) -> Latents:
    """Latents of all images, from the cache or computed and cached, bucket by bucket; of clips each is a file.

    Raises:
        UserError: images or clips that cannot be used, with their number and the first names; the others are cached by then.
    """
    encoders = denoiser.pipeline.components.keys() & {"vae"}
    by = made_by(denoiser, encoders)
    bucket_of, faults, done, spoke = np.asarray(data.bucket_of), [], 0, time.monotonic()
    paths: list[Path] = []
    # a clip is a hundred pictures: several would fill the memory, and an interrupted pass would lose them
    size, what = (1, "clips") if denoiser.clips else (CHUNK, "images")
    file_of, row_of = np.zeros(len(data), np.int64), np.zeros(len(data), np.int64)
    for bucket in np.unique(bucket_of).tolist():
        members = np.flatnonzero(bucket_of == bucket)
        for i in range(0, len(members), size):
            chunk = members[i : i + size].tolist()
            file_of[chunk], row_of[chunk] = len(paths), np.arange(len(chunk))
            contents, unusable = _each(data.content, chunk)
            paths.append(cached(config, "latents", by, data.buckets[bucket], list(contents.values())))
            if unusable or not whole(paths[-1]):
                images, unread = _each(data.image, list(contents))
                faults += [*unusable, *unread]
                if not unusable and not unread:
                    together = torch.stack(list(images.values()))
                    parts = together.split(rows_of(math.prod(together.shape[-2:])))
                    with torch.no_grad():
                        z = [denoiser.to_latents(part.to(denoiser.device)).cpu() for part in parts]
                    write(paths[-1], {"latents": torch.cat(z)})
            done += len(chunk)
            if time.monotonic() - spoke > 10:
                spoke = time.monotonic()
                say(f"latents: {done} of {len(data)} {what}")
    refuse_unusable(faults, len(data), what)
    return Latents(Rows(paths, file_of, row_of))


def _each(look: Callable[[int], Any], samples: Sequence[int]) -> tuple[dict[int, Any], list[str]]:
    """What `look` says of each sample, and the lines of those that it refuses."""
    found, faults = {}, []
    for i in samples:
        try:
            found[i] = look(i)
        except Unusable as error:
            faults.append(str(error))
    return found, faults
