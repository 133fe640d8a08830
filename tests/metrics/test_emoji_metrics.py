import math
import random

import pytest
import torch

from fewstep.metrics.emoji.drawings import (
    CATEGORIES,
    CATEGORY_OF,
    COLORS,
    HELD_OUT,
    NAMES,
    Composition,
    category_caption,
    full_caption,
    render,
)
from fewstep.metrics.emoji.judge import features
from fewstep.metrics.emoji.metrics import CORRECTION_SEED, coverage, emoji_metrics, followed, pairs_of, renderings
from fewstep.metrics.frechet import frechet_distance

PROMPTS = [category_caption(i, c) for i in range(len(CATEGORIES)) for c in (2, 5, 6)]
CAPTIONS = [PROMPTS[i % len(PROMPTS)] for i in range(240)]  # 24 prompts, 10 images of each
GROUPS = [i % len(PROMPTS) for i in range(240)]
EXPECTED = sum(k * (1 - (1 - 1 / k) ** 10) for k in (len(pairs_of(p)) for p in PROMPTS)) / len(PROMPTS)
"""Distinct drawings among 10 real pictures of a prompt that allows k."""


def picture(drawing: int, color: int, **place: int) -> torch.Tensor:
    return torch.from_numpy(render(Composition(drawing, color, **place))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return renderings(CAPTIONS, seed=1)


@pytest.fixture(scope="module")
def real(reference) -> dict[str, tuple[float, float]]:
    return emoji_metrics(renderings(CAPTIONS, seed=2), CAPTIONS, reference, GROUPS)


def test_real_pictures_are_right_in_everything(real):
    for name, perfect in (("background_accuracy", 1), ("category_accuracy", 1), ("blends", 0)):
        assert real[name] == (perfect, 0)
    ratio, error = real["coverage"]
    assert abs(ratio - 1) < 4 * error
    assert error < 0.05
    assert real["coverage_raw"][0] == pytest.approx(ratio * EXPECTED)
    corrected, error = real["fd_emoji_corrected"]
    assert abs(corrected) < 4 * error
    assert corrected < 0.3 * real["fd_emoji"][0]  # the bias of finite N is most of the raw figure


def test_every_picture_has_a_score_and_a_wrong_one_the_lowest(real):
    """`clip_emoji` is their mean."""
    pictures = renderings(CAPTIONS, seed=2)
    assert followed(pictures, CAPTIONS).mean().item() == pytest.approx(real["clip_emoji"][0], rel=1e-6)
    pictures[7] = pictures[CAPTIONS.index(next(p for p in PROMPTS if p != CAPTIONS[7]))]
    assert followed(pictures[:10], CAPTIONS[:10]).argmin() == 7


def test_a_student_that_collapsed(reference, real):
    """One drawing of each prompt, another one for every colour: only variety is lost, and over a category none is."""
    one = {p: pairs_of(p)[(3 * i) % len(pairs_of(p))] for i, p in enumerate(PROMPTS)}
    images = torch.stack([picture(*one[caption]) for caption in CAPTIONS])
    found = emoji_metrics(images, CAPTIONS, reference, GROUPS)
    assert found["category_accuracy"][0] == found["background_accuracy"][0] == 1
    assert found["coverage_raw"][0] == 1
    assert found["coverage"][0] == pytest.approx(1 / EXPECTED)
    assert found["diversity"][0] == pytest.approx(0, abs=1e-5)
    assert found["fd_emoji_corrected"][0] > 5 * found["fd_emoji_corrected"][1]
    assert real["diversity"][0] > 0.5


def test_extrapolation_takes_the_bias_of_the_images_away(reference, real):
    """Of real pictures, below what as many have; its line is drawn by `frechet_infinity`, images in turns in ten groups."""
    seen, known = features(renderings(CAPTIONS, seed=2)).double(), features(reference).double()
    value, error = real["fd_emoji_infinity"]
    assert value < real["fd_emoji"][0]
    at = {i: frechet_distance(known, seen[torch.arange(240) % 2 == i]) for i in (0, 1)}
    whole = frechet_distance(known, seen)
    assert value == pytest.approx(2 * whole - (at[0] + at[1]) / 2, abs=1e-6)
    assert error > 0
    assert "fd_emoji_infinity" not in emoji_metrics(renderings(CAPTIONS[:19], seed=2), CAPTIONS[:19], reference)


def test_a_student_that_follows_no_prompt(reference, real):
    """The same real pictures under shuffled captions: the distance stays, what reads captions falls to chance."""
    images = renderings(CAPTIONS, seed=2)[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
    found = emoji_metrics(images, CAPTIONS, reference)
    assert found["fd_emoji"][0] == pytest.approx(real["fd_emoji"][0], rel=1e-3)
    assert found["background_accuracy"][0] == pytest.approx(1 / 3, abs=0.1)
    assert found["category_accuracy"][0] < 0.3
    assert found["clip_emoji"][0] < real["clip_emoji"][0] - 30
    assert "diversity" not in found


def test_clouds_and_blends_are_near_to_no_drawing(reference):
    images = renderings(CAPTIONS, seed=2).float()
    images[::4] = (images[::4] + images[::4].flip(-1, -2)) / 2
    found = emoji_metrics(images / 255, CAPTIONS, reference)
    assert found["blends"][0] == pytest.approx(0.25, abs=0.04)
    n = len(CAPTIONS)
    share = found["blends"][0]
    assert found["blends"][1] == pytest.approx(math.sqrt(share * (1 - share) / n), rel=0.15)


def test_full_captions_ask_for_one_drawing(reference):
    """Half of the pictures show the neighbour in the category instead."""
    rng = random.Random(3)
    made = [(rng.randrange(len(NAMES)), rng.randrange(len(COLORS))) for _ in range(40)]
    captions = [full_caption(d, c) for d, c in made]
    images = torch.stack([picture(d ^ (i % 2), c) for i, (d, c) in enumerate(made)])
    assert emoji_metrics(images, captions, reference)["category_accuracy"][0] == 0.5


def test_captions_without_color_have_no_background_to_be_right(reference):
    captions = list(CATEGORIES) * 4
    found = emoji_metrics(renderings(captions, seed=4), captions, reference)
    assert "background_accuracy" not in found
    assert found["category_accuracy"][0] == 1
    assert found["blends"][0] == 0


def test_same_input_same_figures(reference):
    images, captions = renderings(CAPTIONS[:20], seed=2), CAPTIONS[:20]
    first = emoji_metrics(images, captions, reference[:20])
    torch.rand(3)  # no global random state
    assert emoji_metrics(images, captions, reference[:20]) == first


def test_coverage_counts_drawings_of_a_prompt_once():
    """Three of four images near a drawing, two of them the same: 2 distinct, of k (1 - (1 - 1/k)^4) expected."""
    prompt = "a fruit on a red background"
    k = len(pairs_of(prompt))
    ratio, raw = coverage([32, 33, 32, None], [prompt] * 4)
    assert raw[0] == 2
    assert ratio[0] == pytest.approx(2 / (k * (1 - (1 - 1 / k) ** 4)))


def test_renderings_avoid_held_out_pairs_unless_asked_for_them():
    for category in range(len(CATEGORIES)):
        for color in range(len(COLORS)):
            caption = category_caption(category, color)
            assert not HELD_OUT & set(pairs_of(caption))
            held = sum(c == color and CATEGORY_OF[d] == category for d, c in HELD_OUT)
            assert len(pairs_of(caption)) == CATEGORY_OF.count(category) - held
    asked = sorted(HELD_OUT)
    assert [pairs_of(full_caption(*pair)) for pair in asked] == [[pair] for pair in asked]
    assert len(pairs_of("")) == len(NAMES) * len(COLORS) - len(HELD_OUT)


def test_refuses_what_does_not_fit(reference):
    two = reference[:2]
    with pytest.raises(ValueError, match="2 images, 3 captions"):
        emoji_metrics(two, CAPTIONS[:3], reference)
    with pytest.raises(ValueError, match="2 images and 1 groups"):
        emoji_metrics(two, CAPTIONS[:2], reference, [0])
    with pytest.raises(ValueError, match="no embedded drawing answers to 'a unicorn'"):
        emoji_metrics(two, ["a unicorn", ""], reference)
    with pytest.raises(ValueError, match="another seed"):
        emoji_metrics(two, CAPTIONS[:2], renderings(CAPTIONS[:2], CORRECTION_SEED))
