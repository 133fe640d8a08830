"""A user's own data, from files to a student: a folder with shapes of its own, shards, a list of captions."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.distill import batches
from fewstep.distill.config import ConfigError, validate
from fewstep.distill.run import train
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config, metrics, write_images
from tests.distill.test_sources import write_shard
from tests.pipelines import tiny_stable_diffusion, tiny_stable_diffusion_3

SMALL = {"max_train_steps": 3, "train_batch_size": 2, "steps": [1], "method": "lcm", "rank": 2, "preflight": False}
BUCKETS = {"resolution": 16, "aspect_ratio_buckets": True, "bucket_reso_steps": 8}


def photographs(folder: Path) -> Path:
    """Wide, tall and square pictures with captions: 32x16, 16x32 and 16x16 pixels, two of each."""
    folder.mkdir()
    rows = []
    for i, (width, height) in enumerate([(32, 16), (16, 32), (16, 16)] * 2):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        rows.append({"file_name": f"{i}.jpg", "text": [f"thing {i}", "a thing"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every batch that is made."""
    made: list[Any] = []
    call = batches.Batches.__call__
    monkeypatch.setattr(batches.Batches, "__call__", lambda self, i, m: (made.append(call(self, i, m)), made[-1])[1])
    return made


def test_a_folder_of_several_shapes(tmp_path: Path, seen: list[Any]):
    """Of the buckets of 16 pixels 8x24, 16x16 and 24x8 are nearest; each batch is of one, and told its sizes."""
    settings = config(tmp_path, train_data=str(photographs(tmp_path / "images")), **(SMALL | BUCKETS))
    folder = train(settings, teacher=denoiser_of(tiny_stable_diffusion()))
    assert len(metrics(folder)) == 3
    shapes = {tuple(batch.x0.shape): batch.size_ids[0].tolist() for batch, _ in seen}
    assert shapes == {
        (2, 4, 4, 12): [16, 32, 2, 0, 8, 24],
        (2, 4, 12, 4): [32, 16, 0, 2, 24, 8],
        (2, 4, 8, 8): [16, 16, 0, 0, 16, 16],
    }
    assert all(batch.shape == tuple(batch.x0.shape[1:]) for batch, _ in seen)
    assert {p for batch, _ in seen for p in batch.prompts} <= {f"thing {i}" for i in range(6)} | {"a thing"}


def test_a_method_without_images_takes_captions_and_shapes(tmp_path: Path, seen: list[Any]):
    """DMD2 from shards: its samples have the shapes of the buckets; no image is encoded."""
    images = photographs(tmp_path / "images")
    members = {
        f"{i}{e}": d for i in range(6) for e, d in ((".jpg", (images / f"{i}.jpg").read_bytes()), (".txt", b"a"))
    }
    write_shard(tmp_path / "000.tar", members)
    teacher = denoiser_of(tiny_stable_diffusion())
    teacher.to_latents = None  # type: ignore[method-assign, assignment]
    settings = {**SMALL, **BUCKETS, "method": "dmd2", "train_data": f"{tmp_path}/*.tar"}
    train(config(tmp_path, **settings), teacher=teacher)
    assert {batch.shape for batch, _ in seen} == {(4, 4, 12), (4, 12, 4), (4, 8, 8)}


def test_a_bad_image_in_buckets_is_named_before_training(tmp_path: Path):
    images = photographs(tmp_path / "images")
    os.truncate(images / "1.jpg", 10)
    settings = config(tmp_path, train_data=str(images), **(SMALL | BUCKETS))
    with pytest.raises(
        UserError, match=r"train_data: 1 of 6 images cannot be used: .*/1.jpg: cannot be read as an image"
    ):
        train(settings, teacher=denoiser_of(tiny_stable_diffusion()))


def test_buckets_need_images(tmp_path: Path):
    nothing = {"method": "dmd2", "train_data": None, "prompts": "prompts.txt"}
    with pytest.raises(ConfigError, match="aspect_ratio_buckets: sorts images; give train_data or dataset_name"):
        train(config(tmp_path, **(SMALL | BUCKETS | nothing)))


def test_a_shift_that_depends_on_the_size_is_refused(tmp_path: Path):
    settings = config(tmp_path, train_data=str(photographs(tmp_path / "images")), **(SMALL | BUCKETS))
    with pytest.raises(ConfigError, match="this teacher's shift depends on the size; train at one size"):
        train(settings, teacher=denoiser_of(tiny_stable_diffusion_3(dynamic_shift=True)))


def test_a_run_without_buckets_is_what_it_was(tmp_path: Path, seen: list[Any]):
    """The order of an epoch and its captions are those of single samples."""
    settings = config(tmp_path, train_data=str(write_images(tmp_path / "images", 5)), **SMALL)
    train(settings, teacher=denoiser_of(tiny_stable_diffusion()))
    from fewstep.distill.random import permutation

    order = [*permutation(5, 0, 0).tolist(), *permutation(5, 0, 1).tolist()]
    assert [p for batch, _ in seen for p in batch.prompts] == [f"thing {i}" for i in order[:6]]


def test_the_example_of_the_page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As docs/data.md has it, beside a folder `images`."""
    photographs(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/data.md").read_text(), re.DOTALL)
    exec(code.replace("config = {", 'config = {"cache_dir": "cache",'), {"pipeline": tiny_stable_diffusion()})
    assert (tmp_path / "runs/mine/student/pytorch_lora_weights.safetensors").is_file()


GOOD = {"method": "lcm", "teacher": "folder", "train_data": "images"}


def test_keys_of_sizes():
    """`resolution` is both sides; sizes of buckets as diffusers' scripts spell them."""
    assert (validate(GOOD).height, validate(GOOD | {"resolution": 512}).width) == (None, 512)
    sizes = [(672, 1568), (1024, 1024)]
    for spelt in ("672,1568; 1024,1024", [[672, 1568], [1024, 1024]]):
        assert validate(GOOD | {"aspect_ratio_buckets": spelt}).aspect_ratio_buckets == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 512, "height": 256}, r"height: give resolution \(now 512\), or height and width, not both"),
        (
            {"prompts": "p.txt"},
            "prompts: train_data has captions of its own, which the run learns from; set one of them",
        ),
        ({"dataset_name": "org/set"}, "dataset_name: give train_data or dataset_name, not both"),
        ({"aspect_ratio_buckets": "672x1568"}, "aspect_ratio_buckets: must be true, false, or sizes as 'height,width"),
        ({"aspect_ratio_buckets": []}, "aspect_ratio_buckets: must name one size at least"),
    ],
)
def test_keys_that_do_not_go_together(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        validate(GOOD | changes)
