"""Which drawing a picture shows: its nearest rendering among every drawing, size and shift.

No network is asked, so that what is measured cannot be learned by a student.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fewstep.metrics.emoji.drawings import COLORS, NAMES, SHIFTS, SIDE, SIZES, place, tiles
from fewstep.metrics.emoji.judge import pixels

NEAR = 15.6
"""A picture is near to a drawing up to this rms distance, 0..255.

Twice the mean distance, 7.8, of renderings that went through the embedded autoencoder (30.6 dB): measure it again with
another one. None of 1,024 such renderings lies farther; of even blends of two drawings of a category 99% do.
"""


class Nearest(NamedTuple):
    """Of each picture: index of the nearest drawing (N,), and rms distance to it (N,), in 0..255."""

    drawing: Tensor
    distance: Tensor


class _Templates(NamedTuple):
    """Spectra of colour times opacity and of opacity, and the sums that a squared distance needs.

    T templates (every drawing at every size, unshifted), F frequencies of a real 2-D transform.
    """

    spectra: Tensor  # (F, 4, T) complex64, conjugate: red, green, blue times opacity, and opacity
    squares: Tensor  # (T,)   sum of (colour times opacity)^2
    mixed: Tensor  # (3, T) sum of colour times opacity^2
    opacity: Tensor  # (T,)   sum of opacity^2


@cache
def _templates() -> _Templates:
    placed = [place(Image.fromarray(tile, "RGBA"), size) for tile in tiles()[: len(NAMES)] for size in SIZES]
    color = torch.stack([torch.from_numpy(p) for p, _ in placed]).permute(0, 3, 1, 2) / 255
    opacity = torch.stack([torch.from_numpy(a) for _, a in placed]).permute(0, 3, 1, 2)
    spectra = torch.fft.rfft2(torch.cat([color, opacity], 1)).conj().flatten(2).permute(2, 1, 0)
    return _Templates(
        spectra.resolve_conj().contiguous(),
        color.square().sum((1, 2, 3)),
        (color * opacity).sum((2, 3)).T,
        opacity.square().sum((1, 2, 3)),
    )


@cache
def _inverse() -> tuple[Tensor, Tensor]:
    """The inverse transform at the shifts from least to greatest: rows (9, 64) complex, columns (33, 9) complex."""
    shifts = torch.arange(min(SHIFTS), max(SHIFTS) + 1).double()
    angle = 2 * torch.pi / SIDE
    rows = torch.exp(1j * angle * torch.outer(shifts, torch.arange(SIDE).double())) / SIDE
    half = torch.arange(SIDE // 2 + 1).double()
    # a real transform keeps half of the columns: all but the first and the last stand for two
    weight = torch.where((half == 0) | (half == SIDE // 2), 1.0, 2.0) / SIDE
    columns = torch.exp(1j * angle * torch.outer(half, shifts)) * weight[:, None]
    return rows.to(torch.complex64), columns.to(torch.complex64)


def border_color(images: Tensor) -> Tensor:
    """Median of the two outermost rows and columns, (N, 3) in 0..1: a drawing leaves most of them bare."""
    x = pixels(images)
    edge = torch.ones(SIDE, SIDE, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return x[:, :, edge].median(-1).values


def named_color(colors: Tensor) -> Tensor:
    """Index into `COLORS` of the colour nearest to each of (N, 3) in 0..1, (N,)."""
    return torch.cdist(colors, torch.tensor(list(COLORS.values())).float() / 255).argmin(1)


@torch.no_grad()
def nearest(images: Tensor, colors: Sequence[int | None], batch: int = 16) -> Nearest:
    """The nearest rendering over the colour of index `colors[i]` (None: over the measured border colour).

    images: (N, 3, 64, 64), uint8 or float in 0..1. With Y = image - colour, a rendering of premultiplied colour P and
    opacity A shifted by s is at the squared distance |Y|^2 - 2 <Y, P_s> + 2 <Y . colour, A_s> + |P - A colour|^2;
    the last term knows no shift, and the two inner products are correlations, taken at all shifts by FFT.
    """
    x = pixels(images)
    named = torch.tensor([[0.0] * 3 if c is None else list(COLORS.values())[c] for c in colors]) / 255
    over = torch.where(torch.tensor([c is None for c in colors])[:, None], border_color(images), named)
    parts = [_nearest(y, b) for y, b in zip(x.split(batch), over.split(batch), strict=True)]
    index, square = (torch.cat(part) for part in zip(*parts, strict=True))
    distance = 255 * (square / (3 * SIDE * SIDE)).clamp(min=0).sqrt()
    return Nearest(index // len(SIZES), distance)


def _nearest(x: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
    """Template (B,) and squared distance (B,) of the nearest rendering of x (B, 3, 64, 64) over colours (B, 3)."""
    t, (rows, columns) = _templates(), _inverse()
    y = x - over[:, :, None, None]
    planes = torch.cat([y, -torch.einsum("bchw,bc->bhw", y, over)[:, None]], 1)
    spectra = torch.fft.rfft2(planes).flatten(2).permute(2, 0, 1)  # (F, B, 4)
    product = torch.bmm(spectra, t.spectra).view(SIDE, SIDE // 2 + 1, -1)  # (64, 33, B T)
    some = (rows @ product.flatten(1)).view(len(rows), SIDE // 2 + 1, -1)
    correlation = torch.einsum("rkn,ks->nrs", some, columns).real  # (B T, 9, 9)
    best = correlation.amax((1, 2)).view(len(x), -1)
    fixed = t.squares - 2 * over @ t.mixed + over.square().sum(1, keepdim=True) * t.opacity
    square, index = (y.square().sum((1, 2, 3))[:, None] - 2 * best + fixed).min(1)
    return index, square
