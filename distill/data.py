"""What a run trains on: prompts, or images with captions; text embeddings and latents computed once and cached.

A data set is a list of samples with an `image(i)` and a `caption(i, u)`, where u is a uniform draw: a sample may have
several captions. Captions are few and shared, so a data set lists them once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.distill import checkpoint
from fewstep.distill.config import TrainConfig
from fewstep.samplers.condition import Condition, concatenate
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError

CACHE = "~/.cache/fewstep"
CACHE_FORMAT = 1
"""Part of every key: to be raised when the same inputs are to give other tensors."""
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
        """A text that names the images' content, for caches."""
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

    def __len__(self) -> int:
        return len(self.compositions)

    def caption(self, i: int, u: float) -> int:
        return self._choices[i][int(np.searchsorted(self._edges, u, side="right"))]

    def image(self, i: int) -> Tensor:
        return torch.from_numpy(self._render(self.compositions[i])).permute(2, 0, 1).float() / 255

    def key(self) -> str:
        pictures = [self._render(c).tobytes() for c in self.compositions[:256]]  # a new sheet or another rendering
        return json.dumps([sha256(b"".join(pictures)).hexdigest(), self.compositions])


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
        self.captions = [read_text(p.with_suffix(".txt"), "caption").strip() for p in self.paths]
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def caption(self, i: int, u: float) -> int:
        return i

    def image(self, i: int) -> Tensor:
        from PIL import Image, ImageOps

        height, width = self.size
        try:
            with Image.open(self.paths[i]) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (width, height))
        except Exception as error:  # each format of PIL has its own kinds
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.paths[i]}: cannot be read as an image ({why})") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def key(self) -> str:
        try:
            return json.dumps([[sha256(p.read_bytes()).hexdigest() for p in self.paths], self.size])
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


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
    prompts = [line.strip() for line in read_text(path, "prompts").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompts {path}: the file holds no prompt; one a line is expected")
    return prompts


def read_text(path: str | Path, what: str) -> str:
    """A text file in UTF-8; UserError where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: cannot be read as text in UTF-8 ({type(error).__name__})") from error


def made_by(denoiser: Denoiser, names: Iterable[str]) -> str:
    """Names what makes cached tensors: the class, and of these components the settings, vocabulary and weights.

    Of each tensor up to 4096 entries are read, bit by bit: training moves all of them.
    """
    digest = sha256(type(denoiser).__name__.encode())
    if labels := getattr(denoiser.pipeline, "labels", None):  # of classes: what their names mean
        digest.update(json.dumps(labels, sort_keys=True).encode())
    for name in sorted(names):
        component = denoiser.pipeline.components[name]
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


def _cached(config: TrainConfig, kind: str, *key: Any) -> Path:
    root = Path(os.path.expanduser(config.cache_dir or CACHE))
    return root / f"{kind}-{sha256(json.dumps([CACHE_FORMAT, *key]).encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cache tensors, and return them as they will be read: another layout in memory is rounded otherwise."""
    from safetensors.torch import save_file

    tensors = {k: v.contiguous() for k, v in tensors.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with checkpoint.writing(path.parent, "set cache_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary)
            os.replace(temporary, path)  # whole or not at all
        finally:
            temporary.unlink(missing_ok=True)
    return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError):
        return None  # torn: computed again


def conditions(config: TrainConfig, denoiser: Denoiser, captions: Sequence[str]) -> Condition:
    """Conditions of all captions and the negative prompt, from the cache or computed and cached; on the CPU.

    Args:
        config: for the cache folder and negative prompt.
        denoiser: encodes.
        captions: every caption once.
    """
    encoders = denoiser.pipeline.components.keys() - {"vae", "scheduler", *denoiser.network_names}
    path = _cached(config, "text", made_by(denoiser, encoders), list(captions), config.negative_prompt)
    stored = _read(path)
    if stored is None:
        with torch.no_grad():
            batches = [captions[i : i + 64] for i in range(0, len(captions), 64)]
            parts = [denoiser.encode(b, config.negative_prompt).to("cpu") for b in batches]
        whole = concatenate([Condition(p.tensors, p.size) for p in parts])
        stored = {f"tensors.{k}": v for k, v in whole.tensors.items()}
        stored |= {f"negative.{k}": v[:1] for k, v in parts[0].negative.items()}
        stored = _write(path, stored)
    tensors, negative = (
        {k.removeprefix(head): v for k, v in stored.items() if k.startswith(head)} for head in ("tensors.", "negative.")
    )
    return Condition(tensors, len(captions), negative)


def latents(config: TrainConfig, denoiser: Denoiser, data: DataSet) -> Tensor:
    """Latents of all images, (N, C, ...), from the cache or computed and cached; on the CPU, float32."""
    encoders = denoiser.pipeline.components.keys() & {"vae"}
    path = _cached(config, "latents", made_by(denoiser, encoders), data.key())
    stored = _read(path)
    if stored is None:
        parts = []
        with torch.no_grad():
            for i in range(0, len(data), 64):
                images = torch.stack([data.image(k) for k in range(i, min(i + 64, len(data)))])
                parts.append(denoiser.to_latents(images.to(denoiser.device)).cpu())
        stored = _write(path, {"latents": torch.cat(parts)})
    return stored["latents"]
