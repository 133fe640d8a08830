"""Data sets, and what is computed once from them: kept by content, whole or computed again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from fewstep.distill import data
from fewstep.distill.config import TrainConfig
from fewstep.distill.data import EmojiImages, EmojiPrompts, ImageFolder, Prompts, read_prompts
from fewstep.metrics.emoji import drawings
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config, write_images
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion


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
    images = ImageFolder(tmp_path, 8, 8)
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
    image = ImageFolder(tmp_path, 16, 16).image(0)
    assert image[0, :, 8].diff().min() > 0  # the ramp now runs down
    assert image[0, 8].std() < 0.02


def read_all(folder: Path) -> None:
    images = ImageFolder(folder, 16, 16)
    images.key()
    for i in range(len(images)):
        images.image(i)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "1.txt").unlink(), "train_data {f}: 1 images lack a .txt caption, e.g. 1.png"),
        (lambda f: (f / "1.txt").write_bytes(b"\xff\xfe\xff"), "caption {f}/1.txt: cannot be read as text in UTF-8"),
        (lambda f: [p.unlink() for p in f.glob("*.png")], "train_data {f}: no images there"),
        (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "train_data {f}: no such folder"),
        (lambda f: (f / "1.png").write_bytes(b"no picture"), "{f}/1.png: cannot be read as an image"),
        (lambda f: os.truncate(f / "1.png", 200), "{f}/1.png: cannot be read as an image"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str):
    folder = write_images(tmp_path / "images", 3)
    spoil(folder)
    with pytest.raises(UserError) as caught:
        read_all(folder)
    assert str(caught.value).startswith(message.format(f=folder))
    assert "\n" not in str(caught.value)


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
    keys = {EmojiImages(n, seed).key() for n, seed in ((3, 0), (3, 1), (4, 0))}
    assert len(keys) == 3
    assert EmojiImages(3, 0).key() in keys
    draw = drawings.render
    monkeypatch.setattr(drawings, "render", lambda c: draw(c) // 2)
    assert EmojiImages(3, 0).key() not in keys


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return denoiser_of(tiny_stable_diffusion())


def counted(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call of the encoders."""
    calls: list[str] = []
    for name in ("encode", "to_latents"):
        real = getattr(denoiser, name)
        monkeypatch.setattr(
            denoiser, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))[1]
        )
    return calls


def computed(settings: TrainConfig, denoiser: Denoiser, images: ImageFolder, calls: list[str]) -> list[str]:
    """What asking for conditions and latents made the encoders do."""
    calls.clear()
    data.conditions(settings, denoiser, images.captions)
    data.latents(settings, denoiser, images)
    return list(calls)


def test_conditions_and_latents_are_those_of_the_encoders(tmp_path: Path, denoiser: Denoiser):
    """Computed and then read; captions over more than one batch; the negative prompt once.

    Both times in the same layout: convolutions round channels-last latents otherwise, and no run would resume exactly.
    """
    settings = config(tmp_path, negative_prompt="blurry")
    captions = [f"thing {i}" for i in range(70)]
    images = ImageFolder(write_images(tmp_path / "images", 3), 16, 16)
    with torch.no_grad():
        expected = denoiser.encode(captions, "blurry")
        z = denoiser.to_latents(torch.stack([images.image(i) for i in range(3)]))
    for _ in range(2):
        got = data.conditions(settings, denoiser, captions)
        assert got.size == 70
        for key, value in expected.tensors.items():
            torch.testing.assert_close(got.tensors[key], value, rtol=0, atol=1e-6)
            torch.testing.assert_close(got.negative[key], expected.negative[key], rtol=0, atol=1e-6)
            assert got.tensors[key].is_contiguous()
        latents = data.latents(settings, denoiser, images)
        torch.testing.assert_close(latents, z, rtol=0, atol=1e-6)
        assert latents.is_contiguous()
    assert not z.is_contiguous()


def test_the_cache_is_of_the_content(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """A changed caption, image, size or negative prompt is computed, and nothing else."""
    calls = counted(denoiser, monkeypatch)
    folder = write_images(tmp_path / "images", 3)
    settings = config(tmp_path)
    assert computed(settings, denoiser, ImageFolder(folder, 16, 16), calls) == ["encode", "to_latents"]
    assert computed(settings, denoiser, ImageFolder(folder, 16, 16), calls) == []
    os.rename(folder, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    (folder / "0.png").touch()
    assert computed(settings, denoiser, ImageFolder(folder, 16, 16), calls) == []
    assert computed(settings, denoiser, ImageFolder(folder, 8, 8), calls) == ["to_latents"]
    assert computed(config(tmp_path, negative_prompt="ugly"), denoiser, ImageFolder(folder, 16, 16), calls) == [
        "encode"
    ]
    (folder / "1.txt").write_text("another thing")
    assert computed(settings, denoiser, ImageFolder(folder, 16, 16), calls) == ["encode"]
    before = (folder / "2.png").stat()
    pixels = np.array(Image.open(folder / "2.png"))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "2.png")
    os.utime(folder / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as copies that keep times do
    assert computed(settings, denoiser, ImageFolder(folder, 16, 16), calls) == ["to_latents"]


def test_the_cache_is_of_the_encoders(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """Not of the network: one UNet may stand beside another text encoder or autoencoder, trained a little further."""
    calls = counted(denoiser, monkeypatch)
    images = ImageFolder(write_images(tmp_path / "images", 3), 16, 16)
    settings, pipeline = config(tmp_path), denoiser.pipeline
    assert computed(settings, denoiser, images, calls) == ["encode", "to_latents"]

    def changed(parameter: torch.nn.Parameter) -> list[str]:
        own = parameter.data.clone()
        parameter.data += 1e-3 * own.abs().mean()
        try:
            return computed(settings, denoiser, images, calls)
        finally:
            parameter.data.copy_(own)

    assert changed(next(pipeline.unet.parameters())) == []
    assert changed(next(pipeline.text_encoder.parameters())) == ["encode"]
    assert changed(next(pipeline.vae.parameters())) == ["to_latents"]
    scale = pipeline.vae.config.scaling_factor
    pipeline.vae.register_to_config(scaling_factor=0.5 * scale)
    assert computed(settings, denoiser, images, calls) == ["to_latents"]
    pipeline.vae.register_to_config(scaling_factor=scale)
    pipeline.tokenizer.model_max_length -= 1
    try:
        assert computed(settings, denoiser, images, calls) == ["encode"]
    finally:
        pipeline.tokenizer.model_max_length += 1
    assert computed(settings, denoiser, images, calls) == []


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, p.stat().st_size - 1), lambda p: p.write_bytes(b"")])
def test_a_torn_cache_is_computed_again(
    tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any]
):
    calls = counted(denoiser, monkeypatch)
    images, settings = ImageFolder(write_images(tmp_path / "images", 3), 16, 16), config(tmp_path)
    computed(settings, denoiser, images, calls)
    expected = data.latents(settings, denoiser, images).clone()  # it lies in the file
    for file in (tmp_path / "cache").iterdir():
        damage(file)
    assert computed(settings, denoiser, images, calls) == ["encode", "to_latents"]
    assert computed(settings, denoiser, images, calls) == []
    assert data.latents(settings, denoiser, images).equal(expected)


def test_a_cache_that_cannot_be_written(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """One line that says what to set; no half of a file."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(.*\); set cache_dir"):
        data.conditions(config(tmp_path, cache_dir=str(blocked)), denoiser, ["a"])

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"cache: cannot be written \(I/O error: No space left on device"):
        data.conditions(config(tmp_path), denoiser, ["a"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_pipeline_without_encoders(tmp_path: Path):
    """Unconditional, in pixels: latents are the images themselves."""
    unconditional = denoiser_of(tiny_ddpm())
    images = ImageFolder(write_images(tmp_path / "images", 3), 8, 8)
    z = data.latents(config(tmp_path), unconditional, images)
    torch.testing.assert_close(z, 2 * torch.stack([images.image(i) for i in range(3)]) - 1)
    assert data.conditions(config(tmp_path), unconditional, images.captions).size == 3


def test_prompts_have_no_images():
    prompts = Prompts(["a", "b"])
    assert json.loads(prompts.key()) == ["a", "b"]
    with pytest.raises(UserError, match="prompts only"):
        prompts.image(0)


def test_errors_of_the_disk_keep_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An image that vanishes between listing and reading."""
    images = ImageFolder(write_images(tmp_path / "images", 3), 16, 16)
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(UserError, match=rf"1.png: cannot be read \({os.strerror(errno.ENOENT)}\)"):
        images.key()
