"""Files of clips: which frames are taken, in which size, what is refused, and what a data set of them is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.distill import cache, sources
from fewstep.distill.clips import clip, upright_size
from fewstep.distill.config import load_config
from fewstep.distill.data import Clips, data_set
from fewstep.distill.files import source
from fewstep.distill.pictures import Unusable
from fewstep.distill.run import train
from fewstep.distill.sources import Source, folder, source_of
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config, killed_in_second, write_clip, write_clips, write_images
from tests.distill.test_sources import write_shard
from tests.pipelines import tiny_stable_diffusion, tiny_wan

SIZE = (64, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of five frames with captions, to be copied."""
    return write_clips(tmp_path_factory.mktemp("clips") / "made", ["one", "two"])


def levels(found: torch.Tensor) -> list[int]:
    """The frames of a clip by their grey, of those that rise by 8."""
    return [round(v) for v in (found.mean((1, 2, 3)) * 255 / 8).tolist()]


@pytest.mark.parametrize(
    ("suffix", "fps"),
    [
        *((".mp4", 30), (".mov", 24), (".webm", 25), (".mkv", 16), (".mp4", 8), (".m4v", 30)),
        *((".mpg", 25), (".ts", 24), (".wmv", 30), (".flv", 30)),
    ],
)
def test_frames_are_those_nearest_in_time(tmp_path: Path, suffix: str, fps: int):
    """To 0, 1/16, 2/16, ... by brute force, of two as near the first; of a slower file every frame, and none twice."""
    data = write_clip(tmp_path / f"a{suffix}", [8 * k for k in range(24)], fps).read_bytes()
    wanted = [min(range(24), key=lambda k: (round(abs(k / fps - j / 16), 6), k)) for j in range(12)]
    assert levels(clip(data, "a", SIZE, 12, 16)) == (wanted if fps >= 16 else list(range(12)))
    assert levels(clip(data, "a", SIZE, 5, fps)) == [0, 1, 2, 3, 4]


def test_an_animation_is_a_clip_on_white(tmp_path: Path):
    """A red square that walks over nothing."""
    frames = []
    for i in range(4):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.paste((255, 0, 0, 255), (16 * i, 0, 16 * i + 16, 64))
        frames.append(image)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    found = clip((tmp_path / "a.gif").read_bytes(), "a", SIZE, 4, 10)
    expected = torch.ones(4, 3, 64, 64)
    for i in range(4):
        expected[i, 1:, :, 16 * i : 16 * i + 16] = 0
    torch.testing.assert_close(found, expected)


def test_frames_are_upright_and_cropped_around_the_centre(tmp_path: Path):
    """192x64 pixels, left black, middle grey, right white, as filmed and turned by a quarter."""
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128], pixels[:, 128:] = 128, 255
    path, turned = tmp_path / "a.mp4", tmp_path / "b.mp4"
    writer = imageio_ffmpeg.write_frames(str(path), (192, 64), fps=16, quality=9, ffmpeg_log_level="error")
    writer.send(None)
    for _ in range(3):
        writer.send(pixels)
    writer.close()
    own = ["-loglevel", "error", "-display_rotation", "90", "-i", str(path), "-c", "copy", str(turned)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *own], check=True)
    for data, size in ((path.read_bytes(), (64, 192)), (turned.read_bytes(), (192, 64))):
        assert upright_size(data, "a") == size
        middle = clip(data, "a", SIZE, 3, 16)[..., 4:-4, 4:-4]
        torch.testing.assert_close(middle, torch.full_like(middle, 128 / 255), atol=0.02, rtol=0)


def test_what_is_no_clip_is_refused_by_name(tmp_path: Path):
    """A text, nothing, a head without its frames, too few of them, one that would be blurred."""
    whole = write_clip(tmp_path / "a.mp4", [100] * 8).read_bytes()
    small = write_clip(tmp_path / "b.mp4", [100] * 8, size=(16, 16)).read_bytes()
    for data, why in [
        (b"no clip", r"cannot be read as a clip \(.*Invalid data"),
        (b"", r"cannot be read as a clip \("),
        (whole[: len(whole) // 2], r"cannot be read as a clip \("),
        (whole, r"is too short, 8 of 9 frames at 16 a second \(num_frames, clip_fps\)"),
        (small, r"16x16 pixels are too few for 64x64"),
    ]:
        with pytest.raises(Unusable, match=rf"^deep/a.mp4: {why}") as caught:
            clip(data, "deep/a.mp4", SIZE, 9, 16)
        assert len(str(caught.value).splitlines()) == 1


def test_clips_of_a_folder_and_of_shards(made: Path, tmp_path: Path):
    """With a .txt, a list of captions, or as members of a shard; the frames and the rate are part of what names them."""
    path = shutil.copytree(made, tmp_path / "clips")
    (path / "0.txt").unlink()
    (path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.mp4", "text": ["one", "eins"]}))
    members = {f"{i}.mp4": (path / f"{i}.mp4").read_bytes() for i in range(2)} | {"0.txt": b"one", "1.txt": b"two"}
    write_shard(tmp_path / "shards/000.tar", members)
    listed = Clips(folder(path), [SIZE], 5, 16)
    packed = Clips(source_of(str(tmp_path / "shards")), [SIZE], 5, 16)
    assert (listed.captions, packed.captions) == (["one", "eins", "two"], ["one", "two"])
    assert listed.image(1).shape == (5, 3, 64, 64)
    assert torch.equal(listed.image(1), packed.image(1))
    assert [listed.content(i) for i in range(2)] == [packed.content(i) for i in range(2)]
    keys = {Clips(folder(path), [SIZE], *taken).content(i) for taken in ((5, 16), (4, 16), (5, 8)) for i in range(2)}
    assert len(keys) == 6


def test_clips_have_the_teachers_frames_unless_a_config_says_others(made: Path, tmp_path: Path):
    for options, changes, taken in [
        ({}, {}, (81, 16)),
        ({}, {"num_frames": 5, "clip_fps": 30}, (5, 30)),
        ({"expand_timesteps": True}, {"num_frames": 9}, (9, 24)),
    ]:
        wan = denoiser_of(tiny_wan(**options))
        settings = config(tmp_path, method="lcm", train_data=str(made), **changes)
        found: Any = data_set(settings, SIZE, wan.frames(settings.num_frames), source(settings, True))
        assert (found.frames, found.rate) == taken
    assert denoiser_of(tiny_stable_diffusion()).frames(5) is None


@pytest.fixture(scope="module")
def wan() -> Denoiser:
    return denoiser_of(tiny_wan())


def test_latents_of_clips_are_cached_one_by_one(
    made: Path, tmp_path: Path, wan: Denoiser, monkeypatch: pytest.MonkeyPatch
):
    """Those of the encoder. An interrupted pass loses the clip that it was at; a clip that is refused, itself alone."""
    path = shutil.copytree(made, tmp_path / "clips")
    good = write_clip(tmp_path / "good.mp4", [150] * 5).read_bytes()
    write_clip(path / "2.mp4", [150] * 3)
    (path / "2.txt").write_text("three")
    settings, data = config(tmp_path), Clips(folder(path), [SIZE], 5, 16)
    encode, rows = wan.to_latents, killed_in_second(monkeypatch, wan)
    with pytest.raises(KeyboardInterrupt):
        cache.latents(settings, wan, data)
    with pytest.raises(
        UserError, match=r"^train_data: 1 of 3 clips cannot be used: .*/2.mp4: is too short, 3 of 5 frames"
    ):
        cache.latents(settings, wan, data)
    (path / "2.mp4").write_bytes(good)
    found = cache.latents(settings, wan, data)[[2, 0]]
    assert rows == [1, 1, 1, 1]  # the first, the second twice, the third
    for row, i in zip(found, (2, 0), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row, encode(data.image(i)[None])[0], rtol=0, atol=1e-6)


def test_clips_in_buckets(tmp_path: Path):
    """Each goes to the nearest shape."""
    for i, size in enumerate([(64, 128), (128, 64), (64, 64)]):
        write_clip(tmp_path / f"{i}.mp4", [100] * 2, size=size)
        (tmp_path / f"{i}.txt").write_text("a")
    found = Clips(folder(tmp_path), [(32, 64), (48, 48), (64, 32)], 2, 16)
    assert found.bucket_of == [0, 2, 1]
    assert [tuple(found.image(i).shape) for i in range(3)] == [(2, 3, 32, 64), (2, 3, 64, 32), (2, 3, 48, 48)]


def test_a_data_set_of_the_package_is_read_as_the_teacher_needs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its column of images, or that of clips; none where captions alone are read."""
    asked, clips = [], folder(made)

    def dataset(*words: Any) -> Source:
        asked.append(words[3:])
        return clips

    monkeypatch.setattr(sources, "dataset", dataset)
    given = {"train_data": None, "dataset_name": "org/set", "image_column": "still", "num_frames": 5}
    for method, moving in [("lcm", False), ("lcm", True), ("dmd2", True), ("lcm", None)]:
        assert source(config(tmp_path, method=method, **given), moving) is clips
    assert asked == [("text", "still", False), ("text", "video", True), ("text", None, True), ("text", None, False)]
    settings = config(tmp_path, method="lcm", **given)
    found = data_set(settings, SIZE, denoiser_of(tiny_wan()).frames(5), source(settings, True))
    assert found.image(1).shape == (5, 3, 64, 64)


@pytest.mark.parametrize("method", [{"method": "lcm"}, {"method": "dmd2", "gan_weight": 1.0e-3}])
def test_files_of_the_other_kind_are_refused_before_a_weight_loads(made: Path, tmp_path: Path, method: dict[str, Any]):
    """Pictures for a teacher of clips, clips for one of images, drawings; where captions alone are read, either will do."""
    tiny_wan(tmp_path / "wan")
    tiny_stable_diffusion(tmp_path / "sd")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    images, clips = write_images(tmp_path / "images", 2), shutil.copytree(made, tmp_path / "clips")
    write_images(clips / "more", 1)
    for teacher, data, said in (
        ("wan", images, f"2 of 2 are images, e.g. {images}/0.png and 1 more; this teacher makes clips"),
        ("wan", clips, f"1 of 3 are images, e.g. {clips}/more/0.png; this teacher makes clips"),
        ("sd", clips, f"2 of 3 are clips, e.g. {clips}/0.mp4 and 1 more; this teacher makes images"),
        ("wan", "embedded:emoji", "holds images; this teacher makes clips"),
    ):
        given = {"teacher": str(tmp_path / teacher), "output_dir": str(tmp_path), "train_data": str(data)}
        with pytest.raises(UserError, match=f"^train_data {data}: {said}") as caught:
            train(load_config(given | method))
        assert len(str(caught.value).splitlines()) == 1
        read = source(load_config(given | {"method": "dmd2"}), teacher == "wan")
        assert read is None or len(read.names) == len(list(Path(data).rglob("*.txt")))
