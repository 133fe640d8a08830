"""What a report samples: N prompts with one seed each, the same for all of its rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.distill.captions import is_table, read_captions
from fewstep.samplers.errors import UserError

FIRST_SEED = 10_000
"""Seed of a report's first image, plus the run's: far from the seeds of the previews."""


@dataclass(frozen=True)
class PromptSet:
    """N prompts.

    Attributes:
        name: as a config and the command line spell it.
        prompts: one of each image; several images share a prompt, so that their variety can be seen.
        groups: number of each image's prompt.
        seeds: one of each image.
        embedded: whether they are captions of the embedded drawings, which have figures of their own.
    """

    name: str
    prompts: list[str]
    groups: list[int]
    seeds: list[int]
    embedded: bool = False

    def __len__(self) -> int:
        return len(self.prompts)


def per_prompt(n: int) -> int:
    """Images of one prompt in a set of n: 16 from 1,024 images on, fewer in smaller sets, for 64 prompts."""
    return max(2, min(16, n // 64))


def category_captions() -> list[str]:
    """`a fruit on a blue background`, for each category and colour."""
    from fewstep.metrics.emoji import drawings as d

    return [d.category_caption(i, c) for i in range(len(d.CATEGORIES)) for c in range(len(d.COLORS))]


def full_captions() -> list[str]:
    """`a red apple on a blue background`, for every pair that training has seen."""
    from fewstep.metrics.emoji import drawings as d

    pairs = [(i, c) for i in range(len(d.NAMES)) for c in range(len(d.COLORS)) if (i, c) not in d.HELD_OUT]
    return [d.full_caption(*pair) for pair in pairs]


def held_out_captions() -> list[str]:
    """`a red apple on a blue background`, for the pairs that no training sees."""
    from fewstep.metrics.emoji import drawings as d

    return [d.full_caption(*pair) for pair in sorted(d.HELD_OUT)]


EMBEDDED: dict[str, Callable[[], list[str]]] = {
    "embedded:emoji": category_captions,
    "embedded:emoji/full": full_captions,
    "embedded:emoji/held-out": held_out_captions,
}

EXAMPLES = "prompts.txt"
"""In a pipeline's folder: prompts that it was made for, one a line."""


def example_captions() -> list[str]:
    """Two of each embedded set."""
    sets = [captions() for captions in EMBEDDED.values()]
    return [caption for every in sets for caption in every[:: len(every) // 2 + 1]]


def prompt_set(source: str | Sequence[str], n: int, seed: int = 0, variants: int | None = None) -> PromptSet:
    """N images' prompts, every prompt equally often and in a shuffled order, and their seeds.

    Args:
        source: a text file, one prompt a line, a table of captions, a name of `EMBEDDED`, or the prompts themselves.
        n: number of images.
        seed: of the order and of the images' seeds.
        variants: images of one prompt; default: one of a table (as in COCO-30k), else `per_prompt(n)`.

    Raises:
        UserError: an unknown name, a file that cannot be read or holds no prompt.
    """
    if not isinstance(source, str):
        name, captions = "prompts", list(source)
    elif source in EMBEDDED:
        name, captions = source, EMBEDDED[source]()
    elif source.startswith("embedded:"):
        raise UserError(f"prompts {source}: no such embedded prompts; shipped: {', '.join(EMBEDDED)}")
    else:
        name, captions = source, read_captions(source)
        variants = variants or (1 if is_table(source) else None)
    number = -(-n // min(n, variants or per_prompt(n)))  # of prompts
    rng = random.Random(seed)
    order: list[str] = []
    while len(order) < number:
        order += rng.sample(captions, len(captions))
    groups = [i % number for i in range(n)]  # in turn: the first columns of the picture are different prompts
    seeds = [FIRST_SEED + seed + i for i in range(n)]
    return PromptSet(name, [order[g] for g in groups], groups, seeds, name in EMBEDDED)
