"""What is computed once from a data set: kept by content, whole or computed again, and read without filling memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from fewstep.distill import cache
from fewstep.distill.batches import Batches
from fewstep.distill.config import TrainConfig
from fewstep.distill.data import Images
from fewstep.distill.sources import folder
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config, killed_in_second, write_images
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion
from tests.pipelines_large import tiny_stable_diffusion_xl


def images_of(path: Path, *size: int) -> Images:
    """The images of a folder in one size."""
    return Images(folder(path), [size])


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


def computed(settings: TrainConfig, denoiser: Denoiser, images: Images, calls: list[str]) -> list[str]:
    """What asking for conditions and latents made the encoders do."""
    calls.clear()
    cache.conditions(settings, denoiser, images.captions)
    cache.latents(settings, denoiser, images)
    return list(calls)


def test_conditions_and_latents_are_those_of_the_encoders(tmp_path: Path, denoiser: Denoiser):
    """Computed and then read; captions over more than one batch; the negative prompt once.

    Both times in the same layout: convolutions round channels-last latents otherwise, and no run would resume exactly.
    """
    settings = config(tmp_path, negative_prompt="blurry")
    captions = [f"thing {i}" for i in range(70)]
    images = images_of(write_images(tmp_path / "images", 3), 16, 16)
    with torch.no_grad():
        expected = denoiser.encode(captions, "blurry")
        z = denoiser.to_latents(torch.stack([images.image(i) for i in range(3)]))
    for _ in range(2):
        got = cache.conditions(settings, denoiser, captions)
        assert got.size == 70
        for key, value in expected.tensors.items():
            torch.testing.assert_close(got.tensors[key], value, rtol=0, atol=1e-6)
            torch.testing.assert_close(got.negative[key], expected.negative[key], rtol=0, atol=1e-6)
            assert got.tensors[key].is_contiguous()
        latents = cache.latents(settings, denoiser, images)[range(3)]
        torch.testing.assert_close(latents, z, rtol=0, atol=1e-6)
        assert latents.is_contiguous()
    assert not z.is_contiguous()


def test_the_cache_is_of_the_content(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """A changed caption, image, size or negative prompt is computed, and nothing else."""
    calls = counted(denoiser, monkeypatch)
    folder = write_images(tmp_path / "images", 3)
    settings = config(tmp_path)
    assert computed(settings, denoiser, images_of(folder, 16, 16), calls) == ["encode", "to_latents"]
    assert computed(settings, denoiser, images_of(folder, 16, 16), calls) == []
    os.rename(folder, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    (folder / "0.png").touch()
    assert computed(settings, denoiser, images_of(folder, 16, 16), calls) == []
    assert computed(settings, denoiser, images_of(folder, 8, 8), calls) == ["to_latents"]
    assert computed(config(tmp_path, negative_prompt="ugly"), denoiser, images_of(folder, 16, 16), calls) == ["encode"]
    (folder / "1.txt").write_text("another thing")
    assert computed(settings, denoiser, images_of(folder, 16, 16), calls) == ["encode"]
    before = (folder / "2.png").stat()
    pixels = np.array(Image.open(folder / "2.png"))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "2.png")
    os.utime(folder / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as copies that keep times do
    assert computed(settings, denoiser, images_of(folder, 16, 16), calls) == ["to_latents"]


def test_the_cache_is_of_the_pipelines_own_settings():
    """SDXL's says what an empty negative prompt is; that no safety checker is there changes nothing."""
    xl, sd = tiny_stable_diffusion_xl(), tiny_stable_diffusion()
    marks = []
    for zeros in (True, False, True):
        xl.register_to_config(force_zeros_for_empty_prompt=zeros)
        marks.append(cache.digest_of(xl, ["text_encoder"], "x"))
    assert marks[0] == marks[2] != marks[1]
    before = cache.digest_of(sd, ["text_encoder"], "x")
    sd.register_to_config(requires_safety_checker=True)
    assert cache.digest_of(sd, ["text_encoder"], "x") == before


def test_the_cache_is_of_the_encoders(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """Not of the network: one UNet may stand beside another text encoder or autoencoder, trained a little further."""
    calls = counted(denoiser, monkeypatch)
    images = images_of(write_images(tmp_path / "images", 3), 16, 16)
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
    images, settings = images_of(write_images(tmp_path / "images", 3), 16, 16), config(tmp_path)
    computed(settings, denoiser, images, calls)
    expected = cache.latents(settings, denoiser, images)[range(3)]
    for file in (tmp_path / "cache").iterdir():
        damage(file)
    assert computed(settings, denoiser, images, calls) == ["encode", "to_latents"]
    assert computed(settings, denoiser, images, calls) == []
    assert cache.latents(settings, denoiser, images)[range(3)].equal(expected)


@pytest.mark.parametrize("limit", [cache.IN_MEMORY, 0])
@pytest.mark.parametrize("kind", ["latents", "text", "negative"])
def test_numbers_that_are_not_finite_are_blamed_on_their_file(
    tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
):
    """A bad disk's, in memory or read row by row; without the file they are made again."""
    monkeypatch.setattr(cache, "IN_MEMORY", limit)
    settings, data = config(tmp_path), Images(folder(write_images(tmp_path / "images", 3)), [(16, 16)])

    def made() -> None:
        cache.latents(settings, denoiser, data)[[0, 1, 2]]
        cache.conditions(settings, denoiser, data.captions)[[0, 1, 2]]

    made()
    (file,) = (tmp_path / "cache").glob(f"{kind}-*")
    with file.open("r+b") as damaged:
        damaged.seek(-64, 2)
        damaged.write(b"\xff" * 64)
    with pytest.raises(
        UserError, match=rf"{kind}-.*: holds numbers that are not finite; delete it, and it is made again"
    ):
        made()
    file.unlink()
    made()


def test_a_cache_that_cannot_be_written(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """One line that says what to set; no half of a file."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(.*\); set cache_dir"):
        cache.conditions(config(tmp_path, cache_dir=str(blocked)), denoiser, ["a"])

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"cache: cannot be written \(I/O error: No space left on device"):
        cache.conditions(config(tmp_path), denoiser, ["a"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_pipeline_without_encoders(tmp_path: Path):
    """Unconditional, in pixels: latents are the images themselves."""
    unconditional = denoiser_of(tiny_ddpm())
    images = images_of(write_images(tmp_path / "images", 3), 8, 8)
    z = cache.latents(config(tmp_path), unconditional, images)[range(3)]
    torch.testing.assert_close(z, 2 * torch.stack([images.image(i) for i in range(3)]) - 1)
    assert cache.conditions(config(tmp_path), unconditional, images.captions).size == 3


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch):
    """Three images a file: killed in the second of four, the first is not computed again, nor are the others twice."""
    monkeypatch.setattr(cache, "CHUNK", 3)
    settings, images = config(tmp_path), images_of(write_images(tmp_path / "images", 10), 16, 16)
    whole = cache.latents(config(tmp_path, cache_dir=str(tmp_path / "other")), denoiser, images)[range(10)]
    rows = killed_in_second(monkeypatch, denoiser)
    with pytest.raises(KeyboardInterrupt):
        cache.latents(settings, denoiser, images)
    found = cache.latents(settings, denoiser, images)
    assert rows == [3, 3, 3, 3, 1]
    assert found[range(10)].equal(whole)
    assert found[[9, 0, 4]].equal(whole[[9, 0, 4]])


def test_images_that_cannot_be_used_are_counted_and_named(
    tmp_path: Path, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
):
    """All at once, whatever is wrong with them; the good ones of other files are cached by then, and the rest is soon done."""
    monkeypatch.setattr(cache, "CHUNK", 2)
    path = write_images(tmp_path / "images", 6)
    good = {i: (path / f"{i}.png").read_bytes() for i in (2, 4, 5)}
    (path / "2.png").write_bytes(b"no image")
    os.truncate(path / "4.png", 300)
    Image.new("RGB", (4, 4)).save(path / "5.png")
    with pytest.raises(UserError) as caught:
        cache.latents(config(tmp_path), denoiser, images_of(path, 16, 16))
    said = str(caught.value)
    assert said.startswith(f"train_data: 3 of 6 images cannot be used: {path}/2.png: cannot be read as an image")
    assert f"{path}/4.png: cannot be read as an image" in said
    assert f"{path}/5.png: 4x4 pixels are too few for 16x16" in said
    for i, data in good.items():
        (path / f"{i}.png").write_bytes(data)
    calls = counted(denoiser, monkeypatch)
    cache.latents(config(tmp_path), denoiser, images_of(path, 16, 16))
    assert calls == ["to_latents"] * 2  # of the two files that had a bad one


def test_buckets_are_cached_apart(tmp_path: Path, denoiser: Denoiser):
    """Each image in the size of its bucket, under its own number."""
    shapes = [(16, 24), (24, 16), (16, 16), (24, 16)]
    for i, (height, width) in enumerate(shapes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    images = Images(folder(tmp_path), [(16, 24), (16, 16), (24, 16)])
    assert images.bucket_of == [0, 2, 1, 2]
    found = cache.latents(config(tmp_path), denoiser, images)
    for i in range(4):
        with torch.no_grad():
            alone = denoiser.to_latents(images.image(i)[None])
        torch.testing.assert_close(found[[i]], alone, rtol=0, atol=1e-5)
    assert found[[3, 1]].shape == (2, 4, 12, 8)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("limit", [0, cache.IN_MEMORY])
def test_memory_stays_flat_over_a_thousand_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    """Read from files and held in memory: what 1,000 batches leave behind is under a twentieth of what they held.

    Each is 4 latents of 16 kB and 4 embeddings of 16 kB, 131 MB in all.
    """
    monkeypatch.setattr(cache, "IN_MEMORY", limit)
    stub: Any = SimpleNamespace(
        pipeline=SimpleNamespace(components={}),
        network_names=(),
        clips=False,
        device="cpu",
        to_latents=lambda images: images.mean((1, 2, 3)).reshape(-1, 1, 1, 1).expand(-1, 4, 32, 32),
        encode=lambda texts, negative: Condition(
            {"hidden": torch.tensor([float(t[6:]) for t in texts]).reshape(-1, 1, 1).expand(-1, 16, 256)},
            len(texts),
            {"hidden": torch.zeros(1, 16, 256)},
        ),
    )
    images, settings = images_of(write_images(tmp_path / "images", 100), 16, 16), config(tmp_path)
    condition = cache.conditions(settings, stub, images.captions)
    latents = cache.latents(settings, stub, images)
    assert (latents.rows.held is None) == (limit == 0)
    batches = Batches(images, (4, 32, 32), condition, latents, 0, 4)
    held = 0
    for i in range(1050):
        batch, _ = batches(i, 0)
        assert batch.x0 is not None
        assert batch.condition is not None
        held += batch.x0.nbytes + batch.condition.tensors["hidden"].nbytes
        if i == 49:
            before, held = resident(), 0
    assert held == 1000 * 4 * 2 * 16384
    assert resident() - before < held / 20
    assert [f"thing {v:g}" for v in batch.condition.tensors["hidden"][:, 0, 0].tolist()] == batch.prompts
    mean = images.image(images.captions.index(batch.prompts[0])).mean()
    torch.testing.assert_close(batch.x0[0], mean.expand(4, 32, 32))
