"""Pictures of a report: a grid with labels, and sheets that hold every image of a row, bit for bit."""

from __future__ import annotations

import math
import struct
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.samplers.errors import UserError

THUMB = 112
GAP = 6
LABEL = 190
FRAMES = 16
"""Frames of a clip side by side: a picture of more is wider than viewers and formats take."""
INK, PAPER, PALE = (25, 25, 25), (255, 255, 255), (110, 110, 110)


def frames(images: Tensor) -> Tensor:
    """Clips (N, F, 3, H, W) as their middle frames; images (N, 3, H, W) as they are."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) uint8 to a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def labelled(rows: Sequence[tuple[str, str, Tensor]], heads: Sequence[str]) -> Image.Image:
    """A grid with a label before each row and a text over each column.

    Args:
        rows: (label, smaller lines below it, images (C, 3, H, W) uint8 or clips).
        heads: text over each of the C columns; the first lines of a long one.
    """
    title, small = ImageFont.load_default(16), ImageFont.load_default(12)
    height, width = rows[0][2].shape[-2:]
    scale = THUMB / width
    if scale > 1:
        scale = math.ceil(scale)  # whole: every pixel stays a square
    side = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    letters = max(8, side[0] // 7)
    wrapped = [textwrap.wrap(head, letters, max_lines=4, placeholder=" ...") for head in heads]
    top = 16 * max((len(lines) for lines in wrapped), default=0) + 2 * GAP
    texts = [(text, font) for label, second, _ in rows for text, font in ((label, title), (second, small))]
    longest = max(font.getlength(line) for text, font in texts for line in text.split("\n"))
    left = max(LABEL, math.ceil(longest) + 3 * GAP)
    canvas = Image.new(
        "RGB", (left + len(heads) * (side[0] + GAP) + GAP, top + len(rows) * (side[1] + GAP) + GAP), PAPER
    )
    pen = ImageDraw.Draw(canvas)
    for i, lines in enumerate(wrapped):
        x = left + i * (side[0] + GAP)
        pen.multiline_text((x, top - GAP), "\n".join(lines), INK, small, anchor="ld", spacing=3)
    for j, (label, second, images) in enumerate(rows):
        y = top + j * (side[1] + GAP)
        middle = y + side[1] // 2
        pen.text((GAP, middle - 10), label, INK, title, anchor="lm")
        pen.multiline_text((GAP, middle + 2), second, PALE, small, spacing=3)
        for i, pixels in enumerate(frames(images)[: len(heads)]):
            canvas.paste(to_image(pixels).resize(side, kind), (left + i * (side[0] + GAP), y))
    return canvas


def sheet(images: Tensor) -> Image.Image:
    """Every image (N, 3, H, W) uint8 side by side without gaps, rows of ceil(sqrt(N)); of clips the frames, 16 in a row."""
    if images.ndim == 4:
        return _sheet(images[None], math.ceil(math.sqrt(len(images))))
    return _sheet(images, min(FRAMES, images.shape[1]))


def _sheet(groups: Tensor, columns: int) -> Image.Image:
    """Groups (G, N, 3, H, W), each in rows of its own, black where the last of them is not full."""
    g, n, channels, height, width = groups.shape
    lines = -(-n // columns)
    padded = torch.cat([groups, groups.new_zeros(g, lines * columns - n, channels, height, width)], 1)
    grid = padded.view(g * lines, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return to_image(grid.reshape(channels, g * lines * height, columns * width))


def cut(picture: Image.Image, n: int, height: int, width: int) -> Tensor:
    """The inverse of `sheet`: its first n images, (n, 3, height, width) uint8."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    lines, columns = pixels.shape[0] // height, pixels.shape[1] // width
    grid = pixels.view(lines, height, columns, width, 3).permute(0, 2, 4, 1, 3)
    return grid.reshape(-1, 3, height, width)[:n].contiguous()


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture in the form that its name says, whole or not at all; UserError where it cannot be written."""
    with replaced(path) as new:
        picture.save(new)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """`checkpoint.replaced` of a picture; UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.replaced(path) as new:
            yield new
    except (
        OSError,
        ValueError,
        RuntimeError,
        struct.error,
    ) as error:  # each format refuses wide pictures in its own way
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
