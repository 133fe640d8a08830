"""Data sets: samples, their captions, and what names their content."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.distill.captions import read_prompts
from fewstep.distill.data import EmojiImages, EmojiPrompts, Images, Prompts, data_set
from fewstep.distill.sources import Source, folder, source_of
from fewstep.metrics.emoji import drawings
from fewstep.samplers.errors import UserError
from tests.distill.runs import config, write_images


def test_an_image_folder(tmp_path: Path):
    """Sorted, also below; in 0..1, channels first; resized and cropped around the centre; captions stripped."""
    (tmp_path / "deep").mkdir()
    left, right = np.zeros((8, 24, 3), np.uint8), np.full((8, 16, 3), 255, np.uint8)
    left[:, 8:16] = (255, 0, 51)  # what a square crop of the middle leaves
    Image.fromarray(left).save(tmp_path / "b.PNG")
    Image.fromarray(right).convert("L").save(tmp_path / "deep/a.jpg")
    (tmp_path / "b.txt").write_text("\ufeff  wide \n", encoding="utf-8")
    (tmp_path / "deep/a.txt").write_text("white", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    images = Images(folder(tmp_path), [(8, 8)])
    assert images.captions == ["wide", "white"]
    assert [images.caption(i, 0.3) for i in range(2)] == [0, 1]
    assert images.image(0).shape == images.image(1).shape == (3, 8, 8)
    torch.testing.assert_close(images.image(0).mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]))
    assert images.image(1).min() > 0.99


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.fromarray(np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2)).save(
        path, exif=exif, quality=95
    )


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path):
    rotated(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a")
    image = Images(folder(tmp_path), [(16, 16)]).image(0)
    assert image[0, :, 8].diff().min() > 0  # the ramp now runs down
    assert image[0, 8].std() < 0.02


def read_all(path: Path) -> None:
    images = Images(source_of(str(path)), [(16, 16)])
    for i in range(len(images)):
        images.content(i)
        images.image(i)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "1.txt").unlink(), "train_data {f}: 1 files lack a .txt caption, e.g. 1.png"),
        (lambda f: (f / "1.txt").write_bytes(b"\xff\xfe\xff"), "caption {f}/1.txt: cannot be read as text in UTF-8"),
        (lambda f: [p.unlink() for p in f.glob("*.png")], "train_data {f}: no images or clips there"),
        (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "train_data {f}: no such folder"),
        (lambda f: (f / "1.png").write_bytes(b"no picture"), "{f}/1.png: cannot be read as an image"),
        (lambda f: os.truncate(f / "1.png", 200), "{f}/1.png: cannot be read as an image"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str):
    path = write_images(tmp_path / "images", 3)
    spoil(path)
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert str(caught.value).startswith(message.format(f=path))
    assert "\n" not in str(caught.value)


def test_prompts_may_be_a_table(tmp_path: Path):
    """Its captions, as in a report; not its lines."""
    (tmp_path / "captions.csv").write_text("image_id,caption\n1,a cat\n2,a dog\n")
    assert data_set(
        config(tmp_path, train_data=None, prompts=str(tmp_path / "captions.csv"), method="dmd2", steps=[1]), (8, 8)
    ).captions == ["a cat", "a dog"]


def test_equal_captions_are_one(tmp_path: Path):
    """Encoded once, whatever the number of images; each image still has all of its own."""
    texts = [("a", "b"), ("a",), ("c", "a", "a")]
    images = Images(Source([str(i) for i in range(3)], texts, lambda i: b""), [(16, 16)])
    assert images.captions == ["a", "b", "c"]
    for i, own in enumerate(texts):
        said = [images.captions[images.caption(i, (k + 0.5) / len(own))] for k in range(len(own))]
        assert tuple(said) == own


def test_prompts_of_a_file(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  a dog  \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_text(" \n\n")
    with pytest.raises(UserError, match=r"prompts.txt: the file holds no prompt; one a line is expected"):
        read_prompts(path)
    for bad in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(UserError, match="cannot be read as text"):
            read_prompts(bad)


def test_shares_of_an_embedded_picture_s_captions():
    """40% full, 35% category, 10% category alone, the rest empty; prompts without images are the same captions."""
    emoji, prompts = EmojiImages(3, 5), EmojiPrompts(3, 5)
    composition = emoji.compositions[1]
    full, category, alone = drawings.captions(composition.drawing, composition.color)
    u = (torch.arange(1000) + 0.5) / 1000
    said = [emoji.captions[emoji.caption(1, x)] for x in u.tolist()]
    assert [said.count(c) for c in (full, category, alone, "")] == [400, 350, 100, 150]
    assert said == [prompts.captions[prompts.caption(1, x)] for x in u.tolist()]
    assert (emoji.has_images, prompts.has_images) == (True, False)


def test_keys_of_embedded_pictures(monkeypatch: pytest.MonkeyPatch):
    """Of what is drawn, not only of its number and seed: the sheet or the rendering may change."""
    keys = {EmojiImages(3, seed).content(i) for seed in (0, 1) for i in range(3)}
    assert len(keys) == 6
    assert EmojiImages(3, 0).content(2) in keys
    draw = drawings.render
    monkeypatch.setattr(drawings, "render", lambda c: draw(c) // 2)
    assert EmojiImages(3, 0).content(2) not in keys


def test_prompts_have_no_images():
    prompts = Prompts(["a", "b"])
    with pytest.raises(UserError, match="prompts only"):
        prompts.image(0)


def test_errors_of_the_disk_keep_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An image that vanishes between listing and reading."""
    images = Images(folder(write_images(tmp_path / "images", 3)), [(16, 16)])
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(UserError, match=rf"1.png: cannot be read \({os.strerror(errno.ENOENT)}\)"):
        images.content(1)
