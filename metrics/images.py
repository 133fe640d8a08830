"""Tensors, folders and lists of image files as batches of uint8 RGB; a file is converted properly or refused by name.

What becomes of a file, in the reference implementations' way where they have one:

- grey, 1 bit, palette: RGB of the same colours.
- transparency (RGBA, grey with alpha, palette or colour key): composited over white. torch-fidelity and pytorch-fid
  drop the alpha channel, which shows colours that no viewer shows; opaque images are the same in both.
- CMYK, YCbCr: Pillow's conversion, without the colour profile.
- 16 bits: the high byte, as Pillow reads 16-bit RGB (its 16-bit grey would otherwise be cut off at 255).
- EXIF orientation: not applied, as nowhere in the field; pixels are taken as stored.
- several frames (GIF, APNG, WebP, TIFF), 32-bit levels, damaged or truncated files, anything else: refused.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SIDECARS = (".txt", ".caption", ".json", ".jsonl", ".csv")
"""Suffixes of files that stand beside images and are none; any other file of a folder must be an image."""

Source = Tensor | str | Path | Sequence[str | Path]
"""Images (N, 3, H, W), uint8 or float in 0..1; a folder; or files in the order wanted."""


def image_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Image files of a folder and the folders below it, by their relative path; a list of files as it stands.

    Of a folder the files that end in `SIDECARS` and hidden ones (`.DS_Store`) are left out, and nothing else.
    """
    if not isinstance(source, str | Path):
        files = [Path(file) for file in source]
        if not files:
            raise ValueError("no images: the list of files is empty")
        return files
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    # unlike Path.rglob this follows linked folders and leaves hidden files out
    found = map(Path, glob.iglob(os.path.join(glob.escape(str(folder)), "**", "*"), recursive=True))
    files = [file for file in found if not file.is_dir() and file.suffix.lower() not in SIDECARS]
    if not files:
        raise ValueError(f"{folder}: holds no images")
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def read_image(path: str | Path) -> Tensor:
    """One file, (3, H, W) uint8. Raises ValueError with the path and the reason for what is not one still image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return torch.from_numpy(_rgb(image)).permute(2, 0, 1).contiguous()
    except UnidentifiedImageError:
        known = ", ".join(SIDECARS)
        raise ValueError(f"{path}: not an image; of a folder only files that end in {known} may be none") from None
    except Exception as error:  # a damaged file makes Pillow's parsers raise whatever they stumble over
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) uint8."""
    from PIL import Image

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's photograph and its previews
        raise ValueError(f"{frames} frames, and not one still image")
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.array(image)
        if (key := image.info.get("transparency")) is not None:
            levels[levels == key] = 65535
        return np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit levels have no known white; save it with 8 or 16 bits")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def to_uint8(images: Tensor) -> Tensor:
    """Images of any shape, uint8 or float in 0..1, as uint8, rounded to the nearest level as files are.

    Outside of 0..1 by less than half a level is rounding of a decoder, by more an error.
    torchmetrics' `normalize=True` cuts off instead, and is half a level darker.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in 0..1; got {images.dtype}")
    levels = (images.float() * 255).round()
    if not ((levels >= 0) & (levels <= 255)).all():  # false for NaN as well
        raise ValueError(f"float images must lie in 0..1; got {images.min():g} to {images.max():g}")
    return levels.to(torch.uint8)


def batches(source: Source, size: int = 64, threads: int = 4) -> Iterator[Tensor]:
    """Images in order, (B, 3, H, W) uint8 with B at most `size`; where neighbours differ in size a new batch begins."""
    if isinstance(source, Tensor):
        if source.ndim != 4 or source.shape[1] != 3 or not len(source):
            raise ValueError(f"images must be (N, 3, H, W) with N at least 1; got {tuple(source.shape)}")
        yield from map(to_uint8, source.split(size))
        return
    alike: list[Tensor] = []
    for image in _ahead(image_files(source), threads):
        if alike and (len(alike) == size or image.shape != alike[0].shape):
            yield torch.stack(alike)
            alike = []
        alike.append(image)
    yield torch.stack(alike)


def _ahead(files: Sequence[Path], threads: int) -> Iterator[Tensor]:
    """Images in order, read by threads a few files ahead: decoding leaves the interpreter free."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            waiting.append(pool.submit(read_image, file))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
