"""The embedded figures: how good pictures made from the embedded captions are.

Every figure comes with a standard error by bootstrap (over images; over captions for `coverage`, over groups for
`diversity`), and is the same for the same input. The errors take the prompts to be drawn too: of two rows with the
same prompts the difference is surer than they say.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from fewstep.metrics.emoji.drawings import COLORS, HELD_OUT, color_of, drawings_of, jittered, render
from fewstep.metrics.emoji.judge import features, similarity
from fewstep.metrics.emoji.nearest import NEAR, border_color, named_color, nearest
from fewstep.metrics.frechet import FEWEST, Running, frechet_distance, frechet_infinity, moments, stderr

CORRECTION_SEED = 30_000
"""Seed of the real pictures behind `fd_emoji_corrected`; a reference must not have it."""


def pairs_of(caption: str) -> list[tuple[int, int]]:
    """The (drawing, color) pairs that teachers saw and a caption allows, or the held-out one that it asks for."""
    color = color_of(caption)
    allowed = [(d, c) for d in drawings_of(caption) for c in (range(len(COLORS)) if color is None else [color])]
    return [pair for pair in allowed if pair not in HELD_OUT] or allowed


def renderings(captions: list[str], seed: int) -> Tensor:
    """Real pictures of captions, (N, 3, 64, 64) uint8: of each caption any of its pairs, in any of its places."""
    rng = random.Random(seed)
    pictures = [render(jittered(*rng.choice(pairs_of(caption)), rng)) for caption in captions]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def emoji_metrics(
    images: Tensor, captions: list[str], reference: Tensor, groups: list[int] | None = None
) -> dict[str, tuple[float, float]]:
    """Figures of images (N, 3, 64, 64), uint8 or float in 0..1, made from captions: name -> (value, standard error).

    `reference`: real pictures, best `renderings` of the same captions. `groups`: images with one number were made
    from one prompt with different seeds.

    fd_emoji: squared Frechet distance of the judge's features to the reference.
    fd_emoji_corrected: less the distance of as many real pictures of the captions, which the finite N alone gives.
    fd_emoji_infinity: fd_emoji extrapolated to infinitely many images; absent for fewer than 20.
    clip_emoji: mean cosine of image and caption, times 100.
    background_accuracy: share whose border is nearest to the colour asked for; absent if no caption names one.
    category_accuracy: share whose nearest drawing is one that the caption allows; for a full caption, the right one.
    blends: share farther than `NEAR` from every drawing.
    coverage_raw, coverage: see `coverage`.
    diversity: mean distance of two features of a group; absent if no group has two.
    """
    n = len(images)
    if n != len(captions) or n < 2 or len(reference) < 2:
        raise ValueError(
            f"needs one caption for each image and two pictures of each kind; got {n} images, {len(captions)} captions, "
            f"{len(reference)} reference pictures"
        )
    if groups is not None and len(groups) != n:
        raise ValueError(f"needs one group for each image; got {n} images and {len(groups)} groups")
    real = renderings(captions, CORRECTION_SEED)
    if torch.equal(real, reference):
        raise ValueError(f"the reference must be made from another seed than {CORRECTION_SEED}")
    colors = [color_of(caption) for caption in captions]
    found = nearest(images, colors)
    right = [d in drawings_of(caption) for d, caption in zip(found.drawing.tolist(), captions, strict=True)]
    near = found.distance <= NEAR
    seen = features(images)

    known = features(reference)
    out = frechet_figures(seen, features(real), known)
    if n >= FEWEST:
        state = Running("emoji")
        state.update(seen)
        out["fd_emoji_infinity"] = frechet_infinity(state, moments(known))
    out["clip_emoji"] = _mean(100 * similarity(seen, captions))
    if asked := [i for i, color in enumerate(colors) if color is not None]:
        border = named_color(border_color(images[asked]))
        out["background_accuracy"] = _mean(border == torch.tensor([colors[i] for i in asked]))
    out["category_accuracy"] = _mean(torch.tensor(right))
    good = [
        d if ok else None for d, ok in zip(found.drawing.tolist(), (near & torch.tensor(right)).tolist(), strict=True)
    ]
    out["coverage"], out["coverage_raw"] = coverage(good, captions)
    out["blends"] = _mean(~near)
    spread = [torch.pdist(seen[i]).mean() for i in _together(groups or []) if len(i) > 1]
    if spread:
        out["diversity"] = _mean(torch.stack(spread))
    return out


def followed(images: Tensor, captions: list[str]) -> Tensor:
    """Cosine of each image and its own caption, times 100, (N,): `clip_emoji` is the mean."""
    return 100 * similarity(features(images), captions)


def frechet_figures(seen: Tensor, real: Tensor, reference: Tensor) -> dict[str, tuple[float, float]]:
    """`fd_emoji` and `fd_emoji_corrected` of features (N, D), as many real ones, and those of the reference (M, D)."""

    def corrected(i: Tensor, j: Tensor, k: Tensor) -> float:
        return frechet_distance(reference[k], seen[i]) - frechet_distance(reference[k], real[j])

    every, rest = torch.arange(len(seen)), torch.arange(len(reference))
    raw = frechet_distance(reference, seen)
    error = stderr(lambda i, k: frechet_distance(reference[k], seen[i]), len(seen), len(reference))
    value = corrected(every, every, rest)
    return {
        "fd_emoji": (raw, error),
        "fd_emoji_corrected": (value, stderr(corrected, len(seen), len(real), len(reference))),
    }


def coverage(found: list[int | None], captions: list[str]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Distinct drawings among the images of a caption: relative to real pictures, and as they are.

    found: the drawing that an image is near to and its caption allows, or None. Returns (ratio, standard error) and
    (mean count of a caption, standard error). Of n real pictures of a caption with k drawings, k (1 - (1 - 1/k)^n)
    are distinct on average; real pictures have none of the pairs that are held out of training, so that who draws those, too,
    is above 1, at 1.064 where every category shows all. Pooled by caption, not over all backgrounds of a category: a few samples of each of ten
    colours find all five drawings even where every single prompt has collapsed to one.
    """
    counts, expected = [], []
    for images in _together(captions):
        k = len({drawing for drawing, _ in pairs_of(captions[images[0]])})
        counts.append(len({found[i] for i in images} - {None}))
        expected.append(k * (1 - (1 - 1 / k) ** len(images)))
    count, real = torch.tensor(counts).double(), torch.tensor(expected).double()
    ratio = (count.sum() / real.sum()).item()
    error = stderr(lambda i: (count[i].sum() / real[i].sum()).item(), len(count), resamples=400)
    return (ratio, error), _mean(count)


def _together(keys: Iterable[Hashable]) -> list[list[int]]:
    """Indices of equal keys, in the order in which they first appear."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        places[key].append(i)
    return list(places.values())


def _mean(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return values.mean().item(), stderr(lambda i: values[i].mean().item(), len(values), resamples=400)
