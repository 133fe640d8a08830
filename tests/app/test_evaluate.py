"""`fewstep evaluate` with networks from files: figures are those of the images on disk, whoever drew them and when."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.metrics.images import read_image
from tests.app.conftest import Answer, run
from tests.metrics.conftest import inception_weights  # noqa: F401  a fixture
from tests.metrics.tiny_clip import noise_images, save_tiny_clip

Command = Callable[..., Answer]
NUM, PROMPTS = 12, ("a cat", "a dog", "a red apple", "a house", "a bird", "the sea")
METRICS = "fd_clip,recall,clip,cmmd,vendi,vendi_ratio,psnr_to_teacher,ssim_to_teacher,clip_to_teacher,pixel_distance"


class Setting:
    """Folders of one evaluation, and its command."""

    def __init__(self, folder: Path, teacher: Path):
        self.folder, self.teacher = folder, teacher
        self.reference, self.clip = (
            folder / "reference",
            save_tiny_clip(folder / "clip", seed=3),
        )  # scores of 10, and not below 0
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("\n".join(PROMPTS))
        self.reference.mkdir()
        for i, image in enumerate(noise_images(10, 64, 64, seed=3)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(self.reference / f"{i}.png")

    def command(self, out: Path, metrics: str = METRICS, *more: object, source: object = None) -> tuple[object, ...]:
        return (
            *("evaluate", source or self.teacher, "--metrics", metrics, "--out", out, "--reference", self.reference),
            *("--steps", "1", "--teacher-steps", 3, "-n", NUM, "--prompts", self.prompts, "--per-prompt", 2),
            *(
                "--batch",
                4,
                "--judge-batch",
                4,
                "--guidance-scale",
                1,
                "--clip-model",
                self.clip,
                "--manifold-space",
                "clip",
            ),
            *more,
        )


@pytest.fixture(scope="module")
def setting(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate"), teacher)


@pytest.fixture(scope="module")
def evaluated(setting: Setting) -> dict[str, Any]:
    """The report of an uninterrupted run."""
    out = setting.folder / "whole" / "report.json"
    answer = run(*setting.command(out))
    assert answer.code == 0, answer.err
    return json.loads(out.read_text())


def images_of(out: Path, steps: str) -> list[Path]:
    (folder,) = out.with_suffix(".images").glob(f"*/{steps}-*")
    return sorted(folder.glob("*.png"))


def values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: figure["value"] for name, figure in row["metrics"].items()}


def test_figures_are_those_of_the_images_on_disk(evaluated: dict[str, Any], setting: Setting):
    """Computed again from the files, each by the library's plainest function."""
    from fewstep.distill.prompt_sets import prompt_set
    from fewstep.metrics.clip import Clip
    from fewstep.metrics.features import extract
    from fewstep.metrics.fidelity import ssim
    from fewstep.metrics.frechet import frechet_distance
    from fewstep.metrics.manifolds import manifolds
    from fewstep.metrics.mmd import cmmd
    from fewstep.metrics.pixels import mean_distance, psnr

    target, one = evaluated["rows"]
    assert [(r["role"], r["steps"], r["nfe"], r["n"]) for r in (target, one)] == [
        ("teacher", 3, 3, NUM),
        ("teacher", 1, 1, NUM),
    ]
    assert list(one["metrics"]) == METRICS.split(",")
    assert not {n for n in target["metrics"] if "teacher" in n or "ratio" in n}
    out = setting.folder / "whole" / "report.json"
    many, few = (torch.stack([read_image(f) for f in images_of(out, s)]) for s in ("3-steps", "1-step"))
    prompts = prompt_set(str(setting.prompts), NUM, 0, 2)
    clip = Clip(str(setting.clip))
    reference, features = extract(clip, setting.reference), extract(clip, few)
    want = {
        "fd_clip": frechet_distance(features, reference),
        "cmmd": cmmd(*(f / f.norm(dim=1, keepdim=True) for f in (features, reference)))[0],
        "recall": manifolds(features, reference)["recall"][0],
        "clip": clip.scores(few, prompts.prompts).mean().item(),
        "psnr_to_teacher": psnr(few, many)[0],
        "ssim_to_teacher": ssim(few, many).mean().item(),
        "clip_to_teacher": clip.similarity(few, many).mean().item(),
        "pixel_distance": mean_distance(few, prompts.groups)[0],
    }
    found = values(one)
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-5)
    assert 1 < found["vendi"] < 2  # of two images
    assert found["vendi_ratio"] == pytest.approx(found["vendi"] / values(target)["vendi"], rel=1e-9)


def test_a_row_tells_its_cost_by_batch_size(evaluated: dict[str, Any]):
    for row in evaluated["rows"]:
        (cost,) = row["cost"]
        assert cost["batch_size"] == 4
        assert cost["images_per_second"] * cost["seconds_per_image"] == pytest.approx(1)
        assert row["seconds_per_image"] == cost["seconds_per_image"] > 0
        assert cost["peak_memory_bytes"] > 50 * 2**20  # at least torch itself


def test_too_few_images_are_noted_with_their_bias(evaluated: dict[str, Any], setting: Setting):
    note, sizes = (line.partition(": ")[2] for line in evaluated["notes"] if "1 step" in line)
    assert sizes.startswith("recall: 12 images and a reference of 10; such figures depend on both numbers")
    assert note.startswith("Frechet distance of 12 samples in 24 dimensions: biased upwards, by ")
    assert note in (setting.folder / "whole" / "report.md").read_text()


def killed(command: tuple[object, ...], images: int) -> int:
    """Run the command in a process that is killed after it has written so many images; its exit code."""
    from fewstep.app import store

    child = os.fork()
    if child == 0:
        written, real = [], store._write

        def write(image: torch.Tensor, path: Path) -> None:
            real(image, path)
            written.append(path)
            if len(written) == images:
                os.kill(os.getpid(), signal.SIGKILL)

        store._write = write
        try:
            run(*command)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_it_goes_on_and_the_figures_are_those_of_an_uninterrupted_run(
    evaluated: dict[str, Any], setting: Setting, tmp_path: Path
):
    """At image 14 of 24, within a batch of four: the target's row is whole, two images of the other's are there."""
    out = tmp_path / "report.json"
    command = setting.command(out)
    assert killed(command, 14) == -signal.SIGKILL
    assert (len(images_of(out, "3-steps")), len(images_of(out, "1-step"))) == (12, 2)
    assert not out.exists()
    there = {f: f.stat().st_mtime_ns for f in (*images_of(out, "3-steps"), *images_of(out, "1-step"))}
    answer = run(*command)
    assert answer.code == 0, answer.err
    assert "2 of 12 images are there; going on" in answer.err
    assert {f: f.stat().st_mtime_ns for f in there} == there
    again = json.loads(out.read_text())
    for row, want in zip(again["rows"], evaluated["rows"], strict=True):
        assert row["metrics"] == want["metrics"]
        assert row["nfe"] == want["nfe"]
    whole = images_of(setting.folder / "whole" / "report.json", "1-step")
    assert [f.read_bytes() for f in images_of(out, "1-step")] == [f.read_bytes() for f in whole]


def test_other_settings_have_images_of_their_own(setting: Setting, tmp_path: Path):
    """Another seed draws other images and leaves the first ones where they were; the first seed finds them again."""
    out = tmp_path / "report.json"
    found = []
    for seed in (0, 5, 0):
        assert run(*setting.command(out, "pixel_distance", "--seed", seed)).code == 0
        found.append(values(json.loads(out.read_text())["rows"][0])["pixel_distance"])
    folders = sorted(out.with_suffix(".images").glob("*/*"))
    assert len(folders) == 2
    assert found[0] == found[2] != found[1]
    assert all(len((f / "costs-0.jsonl").read_text().splitlines()) == 3 for f in folders)  # nothing was drawn twice


def test_two_processes_give_the_figures_of_one(evaluated: dict[str, Any], setting: Setting, tmp_path: Path, root: Path):
    """Each draws and judges whole batches, so that networks see the same ones; sums are in another order."""
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = map(str, setting.command(out))
    done = subprocess.run(
        [*command, "-m", "fewstep.app", *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report   ") == 1
    assert len(list(out.with_suffix(".images").glob("*/*/costs-1.jsonl"))) == 2  # the second drew of both rows
    for row, want in zip(json.loads(out.read_text())["rows"], evaluated["rows"], strict=True):
        for name, figure in row["metrics"].items():
            assert figure["value"] == pytest.approx(want["metrics"][name]["value"], rel=1e-6)
            assert figure["stderr"] == pytest.approx(want["metrics"][name]["stderr"], rel=1e-6)


def test_fid_of_a_folder_to_a_file_of_statistics(
    evaluated: dict[str, Any],
    setting: Setting,
    tmp_path: Path,
    inception_weights: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    """A folder is a source; its FID to `fewstep stats` of another is the distance of their features, and so it is to mu
    and sigma alone, as pytorch-fid and ADM publish them.
    """
    from fewstep.metrics.features import extract
    from fewstep.metrics.frechet import frechet_distance
    from fewstep.metrics.inception import Inception
    from fewstep.metrics.mmd import kid

    monkeypatch.setattr("fewstep.distill.seen.GROUPS", 1)  # an error would take ten more distances
    folder = images_of(setting.folder / "whole" / "report.json", "1-step")[0].parent
    npz, published, out = tmp_path / "reference.npz", tmp_path / "published.npz", tmp_path / "report.json"
    weights = ("--inception-weights", inception_weights)
    answer = run("stats", setting.reference, "--out", npz, *weights)
    assert (answer.code, answer.err) == (0, "")
    assert "10 images, inception-2048-tf1" in answer.out
    with np.load(npz) as file:
        np.savez(published, mu=file["mu"], sigma=file["sigma"])
    x, y = (extract(Inception(weights=inception_weights), f) for f in (folder, setting.reference))
    for names, reference, want in (
        ("fid", published, {"fid": frechet_distance(x, y)}),
        ("kid", setting.reference, {"kid": kid(x, y, size=10)[0]}),
    ):
        command = setting.command(out, names, "--reference", reference, *weights, source=folder)
        assert run(*command).code == 0
        report = json.loads(out.read_text())
        (row,) = report["rows"]
        assert (row["role"], row["n"], row["nfe"]) == ("folder", NUM, None)
        assert values(row) == pytest.approx(want, rel=1e-5)
        assert report["networks"]["inception"].startswith("inception-2048-tf1")
    assert f"| {folder.name}, 12 images | -   | -       |" in out.with_suffix(".md").read_text()


def test_the_teacher_as_reference(setting: Setting, tmp_path: Path):
    """Rows are compared with its many-step images, which are a row without that figure; the same images have no distance."""
    out = tmp_path / "report.json"
    command = setting.command(out, "fd_clip,cmmd", "--reference", "teacher", "--steps", "3,1")
    assert run(*command).code == 0
    target, same, one = json.loads(out.read_text())["rows"]
    assert target["metrics"] == {}
    assert values(same)["fd_clip"] == pytest.approx(0, abs=1e-6 * values(one)["fd_clip"])
    assert values(same)["cmmd"] == pytest.approx(0, abs=1e-9)
    assert values(one)["cmmd"] > 0


def test_a_folder_with_captions_has_a_clip_score(evaluated: dict[str, Any], setting: Setting, tmp_path: Path):
    from fewstep.distill.prompt_sets import prompt_set

    folder = tmp_path / "captioned"
    folder.mkdir()
    prompts = prompt_set(str(setting.prompts), NUM, 0, 2)
    for file, prompt in zip(
        images_of(setting.folder / "whole" / "report.json", "1-step"), prompts.prompts, strict=True
    ):
        shutil.copy(file, folder)
        (folder / file.name).with_suffix(".txt").write_text(prompt + "\n")
    out = tmp_path / "report.json"
    assert run(*setting.command(out, "clip,pixel_distance", source=folder)).code == 0
    (row,) = json.loads(out.read_text())["rows"]
    want = values(evaluated["rows"][1])
    assert values(row) == pytest.approx({n: want[n] for n in ("clip", "pixel_distance")}, rel=1e-6)


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


def test_the_list_of_metrics_names_each_once(fewstep: Command):
    from fewstep.distill.metric_names import METRICS as KNOWN

    answer = fewstep("metrics")
    assert [line.split()[0] for line in answer.out.splitlines()[1:]] == list(KNOWN)
