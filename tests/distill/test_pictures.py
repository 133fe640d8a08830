"""Files that cameras, scanners and editors write: the colours that were meant, or a refusal that names the file."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fewstep.distill.pictures import Unusable, fitted, picture, size_ids, upright_size
from fewstep.metrics.images import read_image

SIDE = (12, 8)  # width and height, as PIL has them


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colour(data: bytes) -> np.ndarray:
    """Mean colour of a file's picture, in 0..255."""
    found = picture(data, "a file")
    assert (found.mode, found.size) == ("RGB", SIDE)
    return np.asarray(found).reshape(-1, 3).mean(0)


def transparent_palette() -> bytes:
    image = Image.new("P", SIDE, 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    return saved(image, "PNG", transparency=1)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (saved(Image.new("L", SIDE, 51), "PNG"), (51, 51, 51)),
        (saved(Image.new("1", SIDE, 1), "PNG"), (255, 255, 255)),
        (saved(Image.new("CMYK", SIDE, (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        (saved(Image.new("CMYK", SIDE, (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (saved(Image.new("RGBA", SIDE, (0, 255, 0, 0)), "PNG"), (255, 255, 255)),  # nothing on white
        (saved(Image.new("RGBA", SIDE, (0, 0, 0, 128)), "WEBP", lossless=True), (127, 127, 127)),
        (saved(Image.new("LA", SIDE, (0, 51)), "PNG"), (204, 204, 204)),
        (transparent_palette(), (255, 255, 255)),
        (saved(Image.new("RGB", SIDE, (255, 0, 0)).convert("P"), "GIF"), (255, 0, 0)),
        (saved(Image.new("RGB", SIDE, (3, 2, 1)), "PNG", transparency=(3, 2, 1)), (255, 255, 255)),
    ],
    ids=["grey", "bilevel", "cmyk jpeg", "cmyk tiff", "clear", "half clear", "grey alpha", "palette", "gif", "key"],
)
def test_modes(data: bytes, wanted: tuple[int, ...]):
    assert colour(data) == pytest.approx(wanted, abs=1.5)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits(kind: str):
    """Value v of 65535 is v / 257 of 255; PIL's own conversion would make all but the first white."""
    ramp = np.linspace(0, 65535, 12 * 8).round().astype(np.uint16).reshape(8, 12)
    found = np.asarray(picture(saved(Image.fromarray(ramp), kind), "a file"))
    for channel in range(3):
        assert found[..., channel].tolist() == np.rint(ramp / 257).astype(int).tolist()


def png_of_sixteen_bits(pixels: np.ndarray, kind: int) -> bytes:
    """A PNG as its specification has it, which PIL reads and does not write; (H, W, channels), kind 2 RGB, 4 LA, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "levels", "wanted"),
    [(2, (255, 128, 3), (255, 128, 3)), (6, (255, 0, 100, 51), (255, 204, 224)), (4, (0, 51), (204, 204, 204))],
    ids=["rgb", "rgba", "grey alpha"],
)
def test_sixteen_bits_of_colour(kind: int, levels: tuple[int, ...], wanted: tuple[int, ...], tmp_path: Path):
    """257 n of 65535 is n of 255, laid on white by alpha, here and where images are judged; 51 of 255 is a fifth."""
    pixels = np.broadcast_to(257 * np.array(levels), (8, 12, len(levels)))
    data = png_of_sixteen_bits(pixels, kind)
    assert colour(data) == pytest.approx(wanted, abs=1)
    (tmp_path / "a.png").write_bytes(data)
    judged = read_image(tmp_path / "a.png").float().mean((1, 2)).tolist()
    assert judged == pytest.approx(wanted, abs=1)


def exchanged_profile() -> bytes:
    """sRGB with red and blue exchanged: the names of two tags in its table, and another description."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", data[128:132])
    names = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}
    for at in range(132, 132 + 12 * count, 12):
        data[at : at + 4] = names.get(bytes(data[at : at + 4]), data[at : at + 4])
    return bytes(data).replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))


def test_an_embedded_profile_says_what_the_numbers_mean():
    """Red of the profile is blue of sRGB; a broken one is passed over."""
    red = Image.new("RGB", SIDE, (255, 0, 0))
    assert colour(saved(red, "PNG", icc_profile=exchanged_profile())) == pytest.approx((0, 0, 255), abs=2)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"broken"):
        assert colour(saved(red, "PNG", icc_profile=profile)).tolist() == [255, 0, 0]


def frames(kind: str) -> bytes:
    several = [Image.new("RGB", SIDE, (i, 0, 0)) for i in (0, 100, 200)]
    return saved(several[0], kind, save_all=True, append_images=several[1:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_what_moves_is_refused(kind: str):
    for look in (picture, upright_size):
        with pytest.raises(Unusable, match=r"cat.x: has 3 frames or pages; a still image is needed"):
            look(frames(kind), "cat.x")


def test_a_photograph_with_a_preview_is_one_picture():
    assert colour(frames("MPO")).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read as an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
        (saved(Image.new("RGB", (64, 64)), "BMP")[:-100], "cannot be read as an image"),
        (saved(Image.fromarray(np.zeros((8, 12), np.float32)), "TIFF"), "32 bits a channel"),
        (saved(Image.fromarray(np.zeros((8, 12), np.int32)), "TIFF"), "32 bits a channel"),
    ],
    ids=["empty", "svg", "torn", "float", "integer"],
)
def test_what_cannot_be_read_is_refused_by_name(data: bytes, why: str):
    with pytest.raises(Unusable, match=rf"^deep/a.png: .*{why}"):
        picture(data, "deep/a.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_the_size_is_that_of_the_upright_picture(orientation: int, format: str):
    """There are 8 orientations; a ninth turns nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.new("RGB", SIDE), format, exif=exif)
    found = picture(data, "a")
    assert upright_size(data, "a") == (found.height, found.width)
    assert found.size == (SIDE[::-1] if 5 <= orientation <= 8 else SIDE)


def test_a_picture_is_not_enlarged_more_than_twice():
    assert fitted(Image.new("RGB", (8, 100)), (16, 16), "a").shape == (3, 16, 16)
    with pytest.raises(Unusable, match=r"^a: 7x100 pixels are too few for 16x16"):
        fitted(Image.new("RGB", (7, 100)), (16, 16), "a")


def test_size_ids_name_the_pixels_that_are_kept():
    """30x40 into 10x20 is halved to 15x20; a bright square where the crop begins comes out in the corner."""
    assert size_ids((30, 40), (10, 20)) == [30, 40, 2, 0, 10, 20]
    assert size_ids((64, 64), (64, 64)) == [64, 64, 0, 0, 64, 64]
    pixels = np.zeros((20, 60, 3), np.uint8)
    top, left = size_ids((20, 60), (20, 20))[2:4]
    pixels[top : top + 4, left : left + 4] = 255
    cropped = fitted(Image.fromarray(pixels), (20, 20), "a")
    assert cropped[:, :4, :4].min() == 1
    assert cropped.sum() == 3 * 16
