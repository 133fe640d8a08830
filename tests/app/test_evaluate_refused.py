"""`fewstep evaluate`: what cannot be had is one line, before anything is drawn for it; what only looks wrong is had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.app.conftest import run
from tests.app.evaluating import Setting, values
from tests.metrics.tiny_clip import noise_images


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["nothing"], ["nothing: no such folder, and not a hub id"]),
        (["--metrics", "fidd"], ["metric fidd: unknown; did you mean fid? known: fid, fid_infinity, kid"]),
        (["--reference", "nowhere"], ["--reference nowhere: neither a folder of images, nor"]),
        (["--metrics", "cmmd", "--reference", "NPZ"], ["metric cmmd: needs the images of the reference"]),
        (["--reference", "BAD"], ["not reference statistics: holds x"]),
        (["--reference", "NPZ"], ["NPZ.npz: mu of 2048 features; clip-", "has 24"]),
        (["--reference", "FEW"], ["FEW: holds 1 of 2 or more that fd_clip needs"]),
        (["--reference", "FEW", "--metrics", "fd_clip,cmmd"], ["FEW: holds 1 of 2 or more that fd_clip needs"]),
        (["--metrics", "recall", "-n", "5"], ["metric recall: needs 6 images or more; say --num 6 or more"]),
        (["--out", "FEW"], ["FEW: a folder; name a file in it, e.g. ", "FEW/report.json"]),
        (["--metrics", "fid", "--inception-weights", "no.pth"], ["no.pth", "--inception-weights FILE"]),
        (["--metrics", "clip", "--clip-model", "ViT-Q"], ["ViT-Q is neither a folder nor a model", "--clip-model"]),
        (["--metrics", "aesthetic"], ["aesthetic: no file", "curl -LO https", "--aesthetic-weights FILE"]),
        (["--metrics", "vendi", "--per-prompt", "1"], ["metric vendi: needs two or more images of a prompt"]),
        (
            ["--metrics", "fd_clip_infinity"],
            ["metric fd_clip_infinity: needs 20 images or more; say --num 20"],
        ),
        (["--metrics", "motion"], ["metric motion: needs clips, and these are images"]),
        (["--metrics", "fd_emoji"], ["metric fd_emoji: needs the embedded prompts", "prompts.txt"]),
        (["--metrics", "precision", "--manifold-space", "vgg"], ["vgg: unknown; known: inception, clip, dino"]),
    ],
)
def test_refusals_are_one_line(setting: Setting, tmp_path: Path, more: list[str], parts: list[str]):
    np.savez(tmp_path / "NPZ.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "BAD.npz", x=np.zeros(3))
    (tmp_path / "FEW").mkdir()
    shutil.copy(setting.reference / "0.png", tmp_path / "FEW")
    places = {m: str(tmp_path / m) + (".npz" if m != "FEW" else "") for m in ("NPZ", "BAD", "FEW")}
    more = [places.get(m, m) for m in more]
    answer = run(*setting.command(tmp_path / "report.json", "fd_clip", *more))
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1), answer.err
    for part in parts:
        assert part in answer.err
    assert not list(tmp_path.rglob("*.images/*/*/0*.png"))  # before anything was drawn


def test_what_a_folder_cannot_have_is_refused(setting: Setting, tmp_path: Path):
    answer = run(*setting.command(tmp_path / "a.json", "psnr_to_teacher", source=setting.reference))
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert "metric psnr_to_teacher: needs a pipeline or a student among the sources" in answer.err
    answer = run(*setting.command(tmp_path / "a.json", "fid", "--reference", "teacher", source=setting.reference))
    assert answer.err.startswith("--reference teacher: folders of images have no teacher")
    bare = setting.command(tmp_path / "a.json", "fid", source=setting.reference)
    at = bare.index("--reference")
    answer = run(*bare[:at], *bare[at + 2 :])
    assert answer.err == "metric fid: needs a reference; say --reference FOLDER, stats.npz or teacher\n"


def test_a_name_does_not_tell_whether_it_moves(setting: Setting, tmp_path: Path):
    """GIF and WebP may be either: still ones are images in any company, those that play are clips, and none is the other."""
    from fewstep.metrics.clips import read_clip
    from fewstep.metrics.video import motion

    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in noise_images(5, 16, 16)]
    for folder in ("still", "moving"):
        (tmp_path / folder).mkdir()
    images[0].convert("P").save(tmp_path / "still" / "0.gif")
    images[1].save(tmp_path / "still" / "1.webp", lossless=True)
    for i, suffix in enumerate(("gif", "webp", "png")):
        images[i].save(tmp_path / "moving" / f"{i}.{suffix}", save_all=True, append_images=images[3:])
    clips = torch.stack([read_clip(f) for f in sorted((tmp_path / "moving").iterdir())])
    out = tmp_path / "report.json"
    for folder, name in (("still", "fd_clip"), ("moving", "motion")):
        assert run(*setting.command(out, name, source=tmp_path / folder)).code == 0
    assert values(json.loads(out.read_text())["rows"][0])["motion"] == pytest.approx(motion(clips).mean().item())
    for folder, name, line in (
        ("moving", "fd_clip", "moving/0.gif: cannot be read: 3 frames, and not one still image"),
        ("still", "motion", "still/0.gif: 1 frame, and a clip has two or more"),
    ):
        answer = run(*setting.command(out, name, source=tmp_path / folder))
        assert (answer.code, answer.out) == (2, "")
        assert line in answer.err


def test_a_folder_whose_prompts_are_not_whole_is_told(setting: Setting, tmp_path: Path):
    """A caption that is empty and one that is not there; a figure that needs none is had all the same."""
    folder = Path(shutil.copytree(setting.reference, tmp_path / "captioned"))
    for i in range(9):
        (folder / f"{i}.txt").write_text("" if i == 4 else "a cat")
    out = tmp_path / "report.json"
    answer = run(*setting.command(out, "clip", source=folder))
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert f"{folder}: clip: needs prompts; a folder of images has them in a NAME.txt beside each, and" in answer.err
    assert f"{folder / '4.png'} has none" in answer.err
    assert run(*setting.command(out, "clip,fd_clip", source=folder)).code == 0
    report = json.loads(out.read_text())
    assert list(values(report["rows"][0])) == ["fd_clip"]
    assert any("clip: needs prompts" in note for note in report["notes"])


@pytest.mark.parametrize("option", [["--scheduler", "ddim"], ["--guidance-scale", "3"], ["--timesteps", "9,5"]])
def test_options_of_pipelines_are_refused_for_students(
    setting: Setting, trained: Path, tmp_path: Path, option: list[str]
):
    words = ("evaluate", trained, "--steps", "2", "-n", "4", "--prompts", setting.prompts, "--out", tmp_path / "r.json")
    answer = run(*words, "--metrics", "pixel_distance", *option)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert f"{option[0]}: students sample by their own plans" in answer.err


def test_a_folder_of_several_sizes(setting: Setting, tmp_path: Path):
    """Scores and the page are had of it; what is compared pixel by pixel is not, and a report names no prompts or seeds."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, image in enumerate(noise_images(8, 48, 64)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64 + 8 * (i % 2), 48)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat" if i < 2 else f"number {i}")
    out = tmp_path / "report.json"
    answer = run(*setting.command(out, "clip,vendi", source=folder))
    assert answer.code == 0, answer.err
    assert "folders of images, reference" in answer.out
    report = json.loads(out.read_text())
    assert not {"n", "seeds", "prompts"} & report.keys()
    assert "Worst and best prompts" in out.with_suffix(".html").read_text()
    answer = run(*setting.command(out, "pixel_distance", source=folder))
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "1.png: 48x72 (height, width), and " in answer.err


def test_a_teacher_of_another_size_is_seen_at_the_first_image(setting: Setting, tmp_path: Path, teacher: Path):
    """Its images are 16 pixels wide; those of the other pipeline, which is the same with fewer channels, 8."""
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": config["sample_size"] // 2}))
    out = tmp_path / "report.json"
    answer = run(*setting.command(out, "psnr_to_teacher", source=teacher), other)
    assert (answer.code, answer.out) == (2, "")
    assert "metric psnr_to_teacher: the teacher's images are 3x16x16, these are 3x8x8" in answer.err
    assert not list(out.with_suffix(".images").glob("other/*"))


@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_figures_are_had_of_as_few_images_as_is_said():
    """And of no fewer: what is refused before anything is drawn is what the figure itself refuses."""
    from fewstep.distill.metric_names import fewest
    from fewstep.metrics.frechet import Running, frechet_figure, frechet_infinity, moments
    from fewstep.metrics.inception import inception_score
    from fewstep.metrics.manifolds import manifolds
    from fewstep.metrics.mmd import kid

    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def of_state(figure: Callable[..., Any]) -> Callable[[torch.Tensor], Any]:
        def of(some: torch.Tensor) -> Any:
            state = Running()
            state.update(some)
            return figure(state, moments(x))

        return of

    for name, figure in (
        ("fid", of_state(frechet_figure)),
        ("fid_infinity", of_state(frechet_infinity)),
        ("is", inception_score),
        ("recall", lambda some: manifolds(some, x)),
        ("kid", lambda some: kid(some, x, size=len(some))),
    ):
        figure(x[: fewest(name)])
        with pytest.raises(ValueError, match=r"\d"):
            figure(x[: fewest(name) - 1])


def test_an_image_that_is_none_is_refused_by_name(setting: Setting, tmp_path: Path):
    shutil.copytree(setting.reference, tmp_path / "reference")
    (tmp_path / "reference" / "notes.pdf").write_text("no image")
    answer = run(*setting.command(tmp_path / "a.json", "fd_clip", "--reference", tmp_path / "reference"))
    assert (answer.code, answer.out) == (2, "")
    assert f"{tmp_path / 'reference' / 'notes.pdf'}: not an image" in answer.err.splitlines()[-1]
