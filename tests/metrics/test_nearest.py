import random
from itertools import product

import numpy as np
import torch

from fewstep.metrics.emoji.drawings import CATEGORY_OF, COLORS, NAMES, SHIFTS, SIZES, Composition, compositions, render
from fewstep.metrics.emoji.nearest import NEAR, border_color, named_color, nearest


def pictures(compositions: list[Composition]) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(c) for c in compositions])).permute(0, 3, 1, 2)


def test_every_rendering_is_found():
    """All drawings in every place, over the asked colour and over the measured one."""
    rng = random.Random(0)
    places = list(product(SHIFTS, SHIFTS))
    made = [
        Composition(d, rng.randrange(len(COLORS)), rng.choice(SIZES), *place)
        for d in range(len(NAMES))
        for place in places
    ]
    x = pictures(made)
    for colors in ([c.color for c in made], [None] * len(made)):
        found = nearest(x, colors)
        assert found.drawing.tolist() == [c.drawing for c in made]
        assert found.distance.max() < 0.3  # renderings are rounded to whole numbers


def test_distance_is_that_of_the_best_of_all_renderings():
    """A blend with noise, against every drawing, size and shift one by one (shifts of the best drawing's sizes)."""
    rng = np.random.default_rng(0)
    a, b = render(Composition(3, 4, 46, 1, -2)), render(Composition(9, 4, 54, -3, 0))
    x = np.clip(0.6 * a + 0.4 * b + rng.normal(0, 8, a.shape), 0, 255).round().astype(np.uint8)
    found = nearest(torch.from_numpy(x).permute(2, 0, 1)[None], [4])
    every = [(d, size, 0, 0) for d in range(len(NAMES)) for size in SIZES]
    shifts = range(min(SHIFTS), max(SHIFTS) + 1)
    every += [(d, size, dx, dy) for d in (3, 9) for size in SIZES for dx in shifts for dy in shifts]
    distance = {
        (d, size, dx, dy): np.sqrt(np.square(render(Composition(d, 4, size, dx, dy)) - x.astype(float)).mean())
        for d, size, dx, dy in every
    }
    best = min(distance, key=distance.__getitem__)
    assert best[0] == found.drawing.item()
    np.testing.assert_allclose(found.distance.item(), distance[best], atol=0.05)


def test_float_and_integer_images_agree_in_batches_and_alone():
    made = compositions(20, 5)
    x, colors = pictures(made), [c.color for c in made]
    whole, single = nearest(x, colors), nearest(x[7:8].float() / 255, colors[7:8])
    torch.testing.assert_close(whole.distance[7:8], single.distance, atol=0.05, rtol=0)


def test_a_wrong_background_is_far():
    made = compositions(10, 6)
    asked = [(c.color + 1) % len(COLORS) for c in made]
    assert (nearest(pictures(made), asked).distance > NEAR).all()


def test_near_separates_slight_blur_from_even_blends():
    """A blur of about 30 dB stays near; the mean of two drawings of a category, at one place, mostly does not."""
    made = compositions(100, 7)
    colors = [c.color for c in made]
    x = pictures(made).float() / 255
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / 0.9).square())
    taps = torch.outer(taps, taps) / taps.sum() ** 2
    padded = torch.nn.functional.pad(x, (3, 3, 3, 3), "replicate")
    blurred = torch.nn.functional.conv2d(padded, taps.expand(3, 1, 7, 7), groups=3)
    rng = random.Random(8)
    others = [
        [d for d in range(len(NAMES)) if CATEGORY_OF[d] == CATEGORY_OF[c.drawing] and d != c.drawing] for c in made
    ]
    blends = (x + pictures([c._replace(drawing=rng.choice(o)) for c, o in zip(made, others, strict=True)]) / 255) / 2
    assert (nearest(blurred, colors).distance <= NEAR).float().mean() >= 0.98
    assert (nearest(blends, colors).distance > NEAR).float().mean() >= 0.9


def test_border_names_the_background():
    made = compositions(300, 9)
    x = pictures(made)
    border = border_color(x)
    assert named_color(border).tolist() == [c.color for c in made]
    expected = torch.tensor([list(COLORS.values())[c.color] for c in made]) / 255
    torch.testing.assert_close(border, expected, atol=1e-6, rtol=0)
