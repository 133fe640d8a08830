"""What a run trains on: prompts, or images with captions; text embeddings and latents computed once and cached.

A data set is a list of samples with an `image(i)` and a `caption(i, u)`, where u is a uniform draw: a sample may have
several captions. Captions are few and shared, so a data set lists them once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.distill.config import TrainConfig
from fewstep.samplers.condition import Condition, concatenate
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError

CACHE = "~/.cache/fewstep"
CAPTION_LEVELS = (0.40, 0.35, 0.10)
"""Shares of full, category and category-alone captions of an embedded picture; the rest have none."""


class DataSet(Protocol):
    """Samples with captions, and images where they have some."""

    captions: list[str]
    has_images: bool

    def __len__(self) -> int: ...

    def caption(self, i: int, u: float) -> int:
        """Index into `captions` for sample i and a uniform draw u in [0, 1)."""
        ...

    def image(self, i: int) -> Tensor:
        """(3, H, W) in 0..1."""
        ...

    def key(self) -> str:
        """A text that names the content, for caches."""
        ...


class Prompts:
    """Prompts alone."""

    has_images = False

    def __init__(self, captions: Sequence[str]):
        self.captions = list(captions)

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, i: int, u: float) -> int:
        return i

    def image(self, i: int) -> Tensor:
        raise UserError("this data set has prompts only")

    def key(self) -> str:
        return json.dumps(self.captions)


class EmojiImages:
    """Compositions of the embedded drawings, `compositions(n, seed)`, captions at four levels of detail."""

    has_images = True

    def __init__(self, n: int, seed: int):
        from fewstep.metrics.emoji import drawings

        self._render = drawings.render
        self.compositions = drawings.compositions(n, seed)
        self.captions = [""]
        index = {"": 0}
        self._choices: list[tuple[int, ...]] = []
        for c in self.compositions:
            choice = []
            for caption in (*drawings.captions(c.drawing, c.color), ""):
                if caption not in index:
                    index[caption] = len(self.captions)
                    self.captions.append(caption)
                choice.append(index[caption])
            self._choices.append(tuple(choice))
        self._edges = np.cumsum(CAPTION_LEVELS)
        self._key = f"emoji {n} {seed}"

    def __len__(self) -> int:
        return len(self.compositions)

    def caption(self, i: int, u: float) -> int:
        return self._choices[i][int(np.searchsorted(self._edges, u, side="right"))]

    def image(self, i: int) -> Tensor:
        return torch.from_numpy(self._render(self.compositions[i])).permute(2, 0, 1).float() / 255

    def key(self) -> str:
        return self._key


class EmojiPrompts(EmojiImages):
    """The captions of `EmojiImages` without the images."""

    has_images = False


class ImageFolder:
    """Images with a `.txt` caption of the same name beside each, resized and centre-cropped to one size."""

    has_images = True
    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

    def __init__(self, folder: str | Path, height: int, width: int):
        root = Path(folder)
        if not root.is_dir():
            raise UserError(f"train_data {folder}: no such folder")
        self.paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in self.SUFFIXES)
        if not self.paths:
            raise UserError(f"train_data {folder}: no images there ({', '.join(self.SUFFIXES)})")
        bare = [p.name for p in self.paths if not p.with_suffix(".txt").is_file()]
        if bare:
            raise UserError(f"train_data {folder}: {len(bare)} images lack a .txt caption, e.g. {bare[0]}")
        self.captions = [p.with_suffix(".txt").read_text(encoding="utf-8").strip() for p in self.paths]
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def caption(self, i: int, u: float) -> int:
        return i

    def image(self, i: int) -> Tensor:
        from PIL import Image, ImageOps, UnidentifiedImageError

        height, width = self.size
        try:
            with Image.open(self.paths[i]) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (width, height))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{self.paths[i]}: cannot be read as an image") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def key(self) -> str:
        entries = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths]
        return json.dumps([entries, self.size, self.captions])


def data_set(config: TrainConfig, pixels: tuple[int, int]) -> DataSet:
    """The data set of a config: `train_data` where it is given, otherwise `prompts`."""
    if config.train_data is not None:
        if config.train_data == "embedded:emoji":
            return EmojiImages(config.num_samples, config.seed)
        return ImageFolder(config.train_data, *pixels)
    if config.prompts == "embedded:emoji":
        return EmojiPrompts(config.num_samples, config.seed)
    return Prompts(read_prompts(config.prompts or ""))


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one a line, blank lines left out; UserError where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path}: cannot be read as text ({type(error).__name__})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts {path}: the file holds no prompt; one a line is expected")
    return prompts


def _cached(config: TrainConfig, kind: str, key: str) -> Path:
    root = Path(os.path.expanduser(config.cache_dir or CACHE))
    return root / f"{kind}-{sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        os.replace(temporary, path)  # whole or not at all
    except OSError as error:
        raise UserError(f"cache {path.parent}: cannot be written ({error.strerror}); set cache_dir") from error


def _read(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError):
        return None  # torn: computed again


def conditions(config: TrainConfig, denoiser: Denoiser, captions: Sequence[str], identity: str) -> Condition:
    """Conditions of all captions and the negative prompt, from the cache or computed and cached; on the CPU.

    Args:
        config: for the cache folder and negative prompt.
        denoiser: encodes.
        captions: every caption once.
        identity: names the text encoders' weights.
    """
    path = _cached(config, "text", json.dumps([identity, list(captions), config.negative_prompt]))
    stored = _read(path)
    if stored is None:
        with torch.no_grad():
            batches = [captions[i : i + 64] for i in range(0, len(captions), 64)]
            parts = [denoiser.encode(b, config.negative_prompt).to("cpu") for b in batches]
        whole = concatenate([Condition(p.tensors, p.size) for p in parts])
        stored = {f"tensors.{k}": v for k, v in whole.tensors.items()}
        stored |= {f"negative.{k}": v[:1] for k, v in parts[0].negative.items()}
        _write(path, stored)
    pick = lambda head: {k.removeprefix(head): v for k, v in stored.items() if k.startswith(head)}  # noqa: E731
    return Condition(pick("tensors."), len(captions), pick("negative."))


def latents(config: TrainConfig, denoiser: Denoiser, data: DataSet, identity: str) -> Tensor:
    """Latents of all images, (N, C, ...), from the cache or computed and cached; on the CPU, float32."""
    path = _cached(config, "latents", json.dumps([identity, data.key()]))
    stored = _read(path)
    if stored is None:
        parts = []
        with torch.no_grad():
            for i in range(0, len(data), 64):
                images = torch.stack([data.image(k) for k in range(i, min(i + 64, len(data)))])
                parts.append(denoiser.to_latents(images.to(denoiser.device)).cpu())
        stored = {"latents": torch.cat(parts)}
        _write(path, stored)
    return stored["latents"]
