"""Sheets keep every bit."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from PIL import Image

from fewstep.distill.picture import cut, labelled, sheet


@pytest.mark.parametrize("n", [1, 7, 9])
def test_cut_is_the_inverse_of_sheet(n: int):
    images = torch.randint(0, 256, (n, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = BytesIO()
    sheet(images).save(file, "PNG")
    assert torch.equal(cut(Image.open(file), n, 4, 6), images)


def test_a_clip_is_a_row_of_its_frames():
    clips = torch.randint(0, 256, (2, 3, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = sheet(clips)
    assert picture.size == (12, 8)
    assert torch.equal(cut(picture, 6, 4, 4).view_as(clips), clips)


def test_a_long_clip_has_rows_of_its_own():
    """Rows of 16, so that 81 frames of 832 pixels stay within what a viewer, JPEG and WebP take."""
    clips = torch.randint(0, 256, (2, 19, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = sheet(clips)
    assert picture.size == (64, 16)
    first, second = (cut(picture.crop((0, top, 64, top + 8)), 19, 4, 4) for top in (0, 8))
    assert torch.equal(first, clips[0])
    assert torch.equal(second, clips[1])


def test_large_images_are_shrunk_and_small_ones_enlarged():
    heads = ["a long prompt that does not fit in one line of the picture"] * 2
    for side, shown in ((64, 128), (16, 112), (512, 112)):
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        assert labelled([("row", "", images)], heads).width == 190 + 2 * (shown + 6) + 6
