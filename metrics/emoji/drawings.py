"""The embedded data: emoji drawings on plain backgrounds, with captions at four levels of detail.

Drawings are Noto Emoji image resources (Apache-2.0, see NOTICE), shipped as one sheet of 64x64 RGBA tiles.
Every picture is a function of a `Composition`, and every list of compositions a function of a seed,
so a data set is a number and the drawings behind a caption are always known.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SHEET = Path(__file__).parent / "assets" / "drawings.png"
SIDE = 64
SIZES = (50,)
SHIFTS = (-4, 4)
"""Side of a drawing and its place off centre, along each axis, in pixels.

Few, and apart by a whole step of the UNet's coarser level: a network this small must learn each place anew, and with three
sizes and every shift between these it stayed blurred however long it was trained.
"""

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 47),
    "orange": (245, 150, 40),
    "yellow": (250, 220, 70),
    "green": (80, 180, 80),
    "blue": (60, 110, 220),
    "purple": (140, 80, 190),
    "pink": (250, 170, 200),
    "gray": (150, 150, 150),
}

CATEGORIES: dict[str, tuple[str, ...]] = {
    "a furry animal": ("dog face", "cat face", "fox face", "koala", "monkey face"),
    "a bird": ("chicken", "penguin", "owl", "duck", "flamingo"),
    "a sea animal": ("octopus", "tropical fish", "spouting whale", "dolphin", "blowfish"),
    "a fruit": ("lemon", "banana", "pineapple", "red apple", "strawberry"),
    "a vegetable": ("aubergine", "carrot", "broccoli", "avocado", "bell pepper"),
    "a sweet": ("soft ice cream", "cookie", "cupcake", "pie", "custard"),
    "a drink": ("teapot", "hot beverage", "wine glass", "beer mug", "glass of milk"),
    "a vehicle": ("rocket", "automobile", "fire engine", "airplane", "sailboat"),
}

NAMES: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)
CATEGORY_OF: tuple[int, ...] = tuple(i for i, names in enumerate(CATEGORIES.values()) for _ in names)


class Composition(NamedTuple):
    """One picture: indices into `NAMES` and `COLORS`, the side of the drawing and its shift from the centre, pixels."""

    drawing: int
    color: int
    size: int = 50
    dx: int = 0
    dy: int = 0


def _held_out() -> frozenset[tuple[int, int]]:
    rng = random.Random(7)
    pairs = [(d, c) for d in range(len(NAMES)) for c in range(len(COLORS))]
    return frozenset(rng.sample(pairs, 24))


HELD_OUT: frozenset[tuple[int, int]] = _held_out()
"""(drawing, color) pairs that no training ever sees."""


@cache
def tiles(path: Path = SHEET) -> np.ndarray:
    """The drawings as shipped, (len(NAMES), 64, 64, 4) uint8 RGBA, in the order of `NAMES`."""
    sheet = np.asarray(Image.open(path).convert("RGBA"))
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    grid = sheet.reshape(rows, SIDE, columns, SIDE, 4).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 4)
    return grid[: len(NAMES)]


@cache
def _placed(drawing: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour times opacity (64, 64, 3) and opacity (64, 64, 1), float32, of a centred drawing resized to `size`."""
    return place(Image.fromarray(tiles()[drawing], "RGBA"), size)


def place(image: Image.Image, size: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_placed`, for any RGBA image."""
    rgba = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    canvas = np.zeros((SIDE, SIDE, 4), np.float32)
    o = (SIDE - size) // 2
    canvas[o : o + size, o : o + size] = rgba
    opacity = canvas[..., 3:] / 255
    return canvas[..., :3] * opacity, opacity


def compose(color: tuple[int, int, int], premultiplied: np.ndarray, opacity: np.ndarray, dx: int, dy: int):
    """The drawing over a plain background, (64, 64, 3) uint8."""
    # the margins are transparent and wider than the shift, so rolling is shifting
    premultiplied, opacity = (np.roll(a, (dy, dx), (0, 1)) for a in (premultiplied, opacity))
    return np.rint(premultiplied + (1 - opacity) * np.asarray(color, np.float32)).astype(np.uint8)


def render(c: Composition) -> np.ndarray:
    """The picture of a composition, (64, 64, 3) uint8, the same bits on every machine."""
    return compose(list(COLORS.values())[c.color], *_placed(c.drawing, c.size), c.dx, c.dy)


def jittered(drawing: int, color: int, rng: random.Random) -> Composition:
    """The pair in one of its places, at random."""
    return Composition(drawing, color, rng.choice(SIZES), rng.choice(SHIFTS), rng.choice(SHIFTS))


def compositions(n: int, seed: int, pairs: list[tuple[int, int]] | None = None) -> list[Composition]:
    """N compositions of the given (drawing, color) pairs, in turn and shuffled; default: every pair not held out."""
    rng = random.Random(seed)
    if pairs is None:
        pairs = [(d, c) for d in range(len(NAMES)) for c in range(len(COLORS)) if (d, c) not in HELD_OUT]
    out: list[Composition] = []
    while len(out) < n:
        out += [jittered(d, c, rng) for d, c in rng.sample(pairs, len(pairs))]
    return out[:n]


def full_caption(drawing: int, color: int) -> str:
    """`a red apple on a blue background`: one drawing."""
    name = NAMES[drawing]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {background_caption(color)}"


def category_caption(category: int, color: int) -> str:
    """`a fruit on a blue background`: any drawing of the category."""
    return f"{list(CATEGORIES)[category]} {background_caption(color)}"


def background_caption(color: int) -> str:
    """`on a blue background`, the end of a caption."""
    name = list(COLORS)[color]
    return f"on {'an' if name[0] in 'aeiou' else 'a'} {name} background"


def captions(drawing: int, color: int) -> tuple[str, str, str]:
    """The three captions that are true of a picture, from most to least detailed; the empty prompt is the fourth."""
    category = CATEGORY_OF[drawing]
    return full_caption(drawing, color), category_caption(category, color), list(CATEGORIES)[category]


def drawings_of(caption: str) -> list[int]:
    """The drawings that a caption allows; all of them for the empty one. Raises ValueError for a caption of no drawing."""
    head = caption.split(" on a")[0]
    if head in CATEGORIES:
        return [d for d in range(len(NAMES)) if CATEGORY_OF[d] == list(CATEGORIES).index(head)]
    if head == "":
        return list(range(len(NAMES)))
    name = head.removeprefix("an ").removeprefix("a ")
    if name not in NAMES:
        raise ValueError(f"no embedded drawing answers to {caption!r}; known: {', '.join(NAMES)}")
    return [NAMES.index(name)]


def color_of(caption: str) -> int | None:
    """The background that a caption asks for, or None where it names none."""
    tail = caption.rsplit(" on a", 1)
    return list(COLORS).index(tail[1].split()[-2]) if len(tail) == 2 and tail[1].endswith(" background") else None
