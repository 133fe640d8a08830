"""Images of a row on disk: written as they come, found again after an interruption, read in parts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.metrics import clips
from fewstep.metrics.clips import read_clip
from fewstep.metrics.images import batches, read_image
from fewstep.samplers.errors import UserError

ABOUT, COSTS, PROMPTS = "about.json", "costs", "prompts.txt"


def check_out(out: Path) -> None:
    """UserError for a report's file that could not be written, before anything is drawn for it."""
    if out.suffix not in ("", ".json"):
        raise UserError(f"--out {out}: must end in .json; .md, .html, .png and .images stand beside it")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; name a file in it, e.g. {out / 'report.json'}")
    with checkpoint.writing(out, "name another file with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out.parent).close()


class Cost(NamedTuple):
    """What one batch cost."""

    images: int
    seconds: float
    rows: int
    peak: int | None


END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last chunk of every PNG."""


class Store:
    """The folder of one row: 000000.png and on, of clips a folder of frames each, and what they cost.

    Args:
        root: of all rows of a report.
        name: of the row's folder, for people.
        about: everything that the images depend on; other settings have another folder, so nothing is written over.
        n: images.
        clips: whether they are clips.
    """

    def __init__(self, root: Path, name: Path, about: Mapping[str, Any], n: int, clips: bool = False):
        said = json.dumps(about, sort_keys=True)
        self.folder = root / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
        self.files = [self.folder / f"{i:06d}{'' if clips else '.png'}" for i in range(n)]
        with checkpoint.writing(self.folder, "name another file with --out"):
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(self.folder / ABOUT, said + "\n")
            checkpoint.write_text(self.folder / PROMPTS, "\n".join(about.get("prompts", [])) + "\n")

    def missing(self, size: int) -> list[list[int]]:
        """Batches of numbers, always the same ones, of which an image is not there, or cut off."""
        every = [list(range(i, min(i + size, len(self.files)))) for i in range(0, len(self.files), size)]
        return [batch for batch in every if not all(_whole(self.files[i]) for i in batch)]

    def add(self, numbers: Sequence[int], images: Tensor, cost: Cost, rank: int = 0) -> None:
        """Write a batch, uint8; an image is there whole or not at all, and one that is there stays."""
        with checkpoint.writing(self.folder, "free some space and run it again; it goes on"):
            for i, image in zip(numbers, images, strict=True):
                if not _whole(self.files[i]):
                    shutil.rmtree(self.files[i], ignore_errors=True)  # a clip's folder
                    _write(image, self.files[i])
            with (self.folder / f"{COSTS}-{rank}.jsonl").open("a") as file:
                file.write(json.dumps(cost) + "\n")

    def costs(self) -> list[Cost]:
        """Of all batches, of earlier runs too; a line that a kill cut off is left out."""
        found = []
        for path in sorted(self.folder.glob(f"{COSTS}-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    images, seconds, rows, peak = json.loads(line)
                    found.append(Cost(int(images), float(seconds), int(rows), peak and int(peak)))
                except (ValueError, TypeError):
                    continue
        return found


def summary(costs: Sequence[Cost], sizes: Sequence[int]) -> tuple[float, list[dict[str, Any]]]:
    """NFE of an image, and for each of the batch sizes speed and memory: medians over the batches of that size.

    Where there is no batch of these sizes, of those that there are.
    """
    nfe = sum(c.rows for c in costs) / sum(c.images for c in costs)
    known = {c.images for c in costs}
    table = []
    for size in sorted(known & set(sizes) or known):
        some = [c for c in costs if c.images == size]
        seconds = statistics.median(c.seconds for c in some) / size
        peaks = [c.peak for c in some if c.peak is not None]
        table.append(
            {
                "batch_size": size,
                "seconds_per_image": seconds,
                "images_per_second": 1 / seconds,
                "peak_memory_bytes": max(peaks, default=None),
            }
        )
    return nfe, table


def plain(name: str) -> str:
    """A name as a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "row"


def _whole(path: Path) -> bool:
    """Whether a PNG ends as one does, or all of a clip's do."""
    if path.is_dir():
        return bool(frames := list(path.iterdir())) and all(map(_whole, frames))
    try:
        with path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            return file.read() == END
    except OSError:  # none, or shorter
        return False


def _write(image: Tensor, path: Path) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    if image.ndim == 4:
        part.mkdir(exist_ok=True)
        for f, frame in enumerate(image):
            _png(frame, part / f"{f:03d}.png")
    else:
        _png(image, part)
    os.replace(part, path)


def _png(image: Tensor, path: Path) -> None:
    # level 1: twice as fast as Pillow's 6, files a tenth larger
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, "PNG", compress_level=1)


def read(files: Sequence[Path], moving: bool = False) -> Tensor:
    """Images (N, 3, H, W), or where they are `moving` clips (N, F, 3, H, W), uint8; UserError where sizes differ."""
    found = [read_clip(f) if moving else read_image(f) for f in files]
    for file, image in zip(files, found, strict=True):
        if image.shape != found[0].shape:
            sizes = ["x".join(map(str, [*x.shape[:-3], *x.shape[-2:]])) for x in (image, found[0])]
            raise UserError(
                f"{file}: {sizes[0]} (height, width), and {files[0]} {sizes[1]}; they are compared pixel by pixel"
            )
    return torch.stack(found)


def read_batches(
    files: Sequence[Path], numbers: Sequence[int], size: int, moving: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """(numbers, images) of some of the files, at most `size` at once, of one size and length each."""
    done = 0
    if not numbers:
        return
    some = [files[i] for i in numbers]
    for images in clips.batches(some, size) if moving else batches(some, size):
        yield list(numbers[done : done + len(images)]), images
        done += len(images)
