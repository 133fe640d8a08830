"""Files of every kind that Pillow writes: converted to the pixels that a viewer shows, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.metrics.images import batches, image_files, read_image, to_uint8

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def save(array: np.ndarray, path: Path, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    found = read_image(path)
    assert found.dtype == torch.uint8
    return found.permute(1, 2, 0).numpy()


def test_rgb_and_grey_keep_their_levels(tmp_path):
    np.testing.assert_array_equal(pixels(save(RGB, tmp_path / "a.png")), RGB)
    np.testing.assert_array_equal(pixels(save(GREY, tmp_path / "b.png")), np.stack([GREY] * 3, -1))
    bits = GREY > 127
    np.testing.assert_array_equal(pixels(save(bits, tmp_path / "c.png")), np.stack([bits * np.uint8(255)] * 3, -1))


def test_palette_shows_its_colours(tmp_path):
    image = Image.fromarray(GREY % 4, "P")
    colors = np.array([[10, 20, 30], [250, 0, 7], [1, 2, 3], [99, 98, 97]], np.uint8)
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), colors[GREY % 4])
    image.save(tmp_path / "b.png", transparency=1)
    shown = np.array([[10, 20, 30], [255, 255, 255], [1, 2, 3], [99, 98, 97]], np.uint8)
    np.testing.assert_array_equal(pixels(tmp_path / "b.png"), shown[GREY % 4])


@pytest.mark.parametrize("colors", [RGB, GREY[..., None]])
def test_transparency_shows_white(tmp_path, colors):
    """c a + 255 (1 - a), to the nearest level."""
    opacity = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    opacity[0], opacity[1] = 0, 255
    found = pixels(save(np.concatenate([colors, opacity], -1), tmp_path / "a.png")).astype(float)
    expected = colors * (opacity / 255) + 255 * (1 - opacity / 255)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (5, 7, 3)), atol=1)
    assert (found[0] == 255).all()
    np.testing.assert_array_equal(found[1], np.broadcast_to(colors[1], (7, 3)))


def test_colour_key_shows_white(tmp_path):
    array = RGB.copy()
    array[2, 3] = (9, 8, 7)
    Image.fromarray(array).save(tmp_path / "a.png", transparency=(9, 8, 7))
    array[2, 3] = 255
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), array)


def test_cmyk_is_light_that_ink_leaves(tmp_path):
    """(1 - C)(1 - K) of each channel, saved without loss."""
    ink = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.tif")
    light = 1 - ink.astype(float) / 255
    np.testing.assert_allclose(pixels(tmp_path / "a.tif"), 255 * light[..., :3] * light[..., 3:], atol=1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, suffix):
    """An 8-bit level v is 257 v in 16 bits."""
    path = save(GREY.astype(np.uint16) * 257, tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(pixels(path), np.stack([GREY] * 3, -1))


def animated(path: Path) -> None:
    frames = [Image.fromarray(255 - RGB), Image.fromarray(GREY).convert("RGB")]
    Image.fromarray(RGB).save(path, save_all=True, append_images=frames)


def cut(path: Path) -> None:
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


REFUSED = {
    "a.gif": (animated, "3 frames"),
    "b.png": (animated, "3 frames"),
    "c.webp": (animated, "3 frames"),
    "d.tif": (animated, "3 frames"),
    "e.png": (cut, "cannot be read"),
    "f.jpg": (cut, "cannot be read"),
    "g.webp": (cut, "cannot be read"),
    "h.bmp": (cut, "cannot be read"),
    "i.tif": (lambda path: save(GREY.astype(np.float32), path), "32-bit levels"),
    "j.png": (lambda path: path.write_text("no image"), "not an image"),
    "k.py": (lambda path: path.write_text("print()"), "not an image"),
    "l.jpg": (lambda path: path.write_bytes(b""), "not an image"),
    "m.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_still_image_is_refused_by_name(tmp_path, name):
    """Also from within a folder, among good files."""
    make, reason = REFUSED[name]
    for good in ("0.png", "z.png"):
        save(RGB, tmp_path / good)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as raised:
        list(batches(tmp_path))
    assert str(raised.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(raised.value)


def test_order_is_that_of_relative_paths_and_sidecars_are_left_out(tmp_path):
    names = ["b/1.png", "b/0.png", "a.png", "c.PNG", "B.png", "b/10.png"]
    (tmp_path / "b").mkdir()
    for name in (*names, ".hidden.png"):
        save(RGB, tmp_path / name)
    for name in ("a.txt", "b/metadata.jsonl", "x.JSON", "prompts.csv", "a.caption"):
        (tmp_path / name).write_text("?")
    found = [file.relative_to(tmp_path).as_posix() for file in image_files(tmp_path)]
    assert found == ["B.png", "a.png", "b/0.png", "b/1.png", "b/10.png", "c.PNG"]
    files = [tmp_path / name for name in names]
    assert image_files(files) == files


def test_linked_folders_are_read(tmp_path):
    (tmp_path / "real").mkdir()
    save(RGB, tmp_path / "real" / "0.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(tmp_path / "real")
    assert image_files(tmp_path / "set") == [tmp_path / "set" / "class" / "0.png"]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_batches_hold_every_image_once_in_order(tmp_path, size):
    """A size that changes between two files begins a batch."""
    made = [np.full((4, 4 if i < 7 else 5, 3), i, np.uint8) for i in range(30)]
    for i, array in enumerate(made):
        save(array, tmp_path / f"{i:02}.png")
    found = list(batches(tmp_path, size, threads=3))
    assert all(len(part) <= size for part in found)
    assert [int(image[0, 0, 0]) for part in found for image in part] == list(range(30))
    assert len(list(batches(tmp_path, 100))) == 2


def test_float_images_are_rounded_as_files_are():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)
    assert torch.equal(to_uint8(levels.float() / 255 + 0.4 / 255 * (levels < 255)), levels)
    assert to_uint8(levels) is levels
    assert to_uint8(torch.tensor([-1e-7, 1 + 1e-6])).tolist() == [0, 255]
    parts = list(batches((levels.float() / 255).view(1, 1, 16, 16).expand(5, 3, 16, 16), 2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(parts[0][0, 2].flatten(), levels)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.full((2, 3, 4, 4), 1.01), "0..1; got 1.01"),
        (torch.full((2, 3, 4, 4), -0.5), "0..1; got -0.5"),
        (torch.full((2, 3, 4, 4), float("nan")), "0..1; got nan"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "int64"),
        (torch.zeros(3, 4, 4), r"\(N, 3, H, W\)"),
        (torch.zeros(0, 3, 4, 4), "N at least 1"),
        (torch.zeros(2, 4, 4, 3), r"\(2, 4, 4, 3\)"),
    ],
)
def test_tensors_of_another_kind_are_refused(images, reason):
    with pytest.raises(ValueError, match=reason):
        list(batches(images))


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match="holds no images"):
        image_files(tmp_path)
    with pytest.raises(ValueError, match="list of files is empty"):
        image_files([])
