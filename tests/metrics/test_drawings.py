"""The embedded pictures: which pairs a training never sees, and the same bits from one composition on every machine."""

from __future__ import annotations

from hashlib import sha256
from itertools import product

from fewstep.metrics.emoji.drawings import COLORS, HELD_OUT, NAMES, SHIFTS, Composition, compositions, render


def test_what_is_held_out_is_never_drawn():
    """In no list of compositions, while every other pair is; and the 24 are those that the shipped teacher never saw."""
    held = "".join(f"{d},{c};" for d, c in sorted(HELD_OUT))
    assert len(HELD_OUT) == 24
    assert sha256(held.encode()).hexdigest()[:16] == "ffaf0d0b6c09da34"
    everything = set(product(range(len(NAMES)), range(len(COLORS))))
    for seed in (0, 1, 41_000):
        made = compositions(5000, seed)
        assert len(made) == 5000
        assert {(c.drawing, c.color) for c in made} == everything - HELD_OUT


def test_lists_and_pictures_are_the_same_bits_everywhere():
    """Caches and the shipped judge rest on them: a data set is its number and seed. Each drawing, colour and place."""
    listed = ";".join(",".join(map(str, c)) for c in compositions(500, 5))
    assert sha256(listed.encode()).hexdigest()[:16] == "71eed068a64f8856"
    places = list(product(SHIFTS, SHIFTS))
    made = [Composition(d, d % len(COLORS), 50, *places[d % len(places)]) for d in range(len(NAMES))]
    pictures = b"".join(render(c).tobytes() for c in made)
    assert len(pictures) == len(NAMES) * 64 * 64 * 3
    assert sha256(pictures).hexdigest()[:16] == "d3da3ad3cb5453a8"
