"""`fewstep evaluate` with networks from files: figures are those of the images on disk, whoever drew them and when."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.metrics.images import read_image
from tests.app.conftest import Answer, run
from tests.app.evaluating import METRICS, NUM, Setting, images_of, values
from tests.metrics.conftest import inception_weights  # noqa: F401  a fixture
from tests.processes import ended, group

Command = Callable[..., Answer]


@pytest.fixture(scope="module")
def evaluated(setting: Setting) -> dict[str, Any]:
    """The report of an uninterrupted run."""
    out = setting.folder / "whole" / "report.json"
    answer = run(*setting.command(out))
    assert answer.code == 0, answer.err
    return json.loads(out.read_text())


def test_figures_are_those_of_the_images_on_disk(evaluated: dict[str, Any], setting: Setting):
    """Computed again from the files, each by the library's plainest function; an error is over prompts, not over images."""
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
    assert one["metrics"]["psnr_to_teacher"]["stderr"] == pytest.approx(psnr(few, many, prompts.groups)[1], rel=1e-5)
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


@pytest.mark.parametrize("other", [("--seed", 5), ("--guidance-scale", 3)])
def test_other_settings_have_images_of_their_own(setting: Setting, tmp_path: Path, other: tuple[str, int]):
    """Another one draws other images and leaves the first ones where they were; the first one finds them again."""
    out = tmp_path / "report.json"
    found = []
    for more in ((), other, ()):
        assert run(*setting.command(out, "pixel_distance", *more)).code == 0
        found.append(values(json.loads(out.read_text())["rows"][0])["pixel_distance"])
    folders = sorted(out.with_suffix(".images").glob("*/*"))
    assert len(folders) == 2
    assert found[0] == found[2] != found[1]
    assert all(len((f / "costs-0.jsonl").read_text().splitlines()) == 3 for f in folders)  # nothing was drawn twice


def module(command: tuple[object, ...]) -> None:
    """`python -m fewstep.app COMMAND`, for a process of its own."""
    sys.argv = ["fewstep.app", *map(str, command)]
    runpy.run_module("fewstep.app", run_name="__main__")


def test_two_processes_give_the_figures_of_one(evaluated: dict[str, Any], setting: Setting, tmp_path: Path):
    """Each draws and judges whole batches, so that networks see the same ones; sums are in another order."""
    out, log = tmp_path / "report.json", tmp_path / "log.txt"
    ended(group(module, setting.command(out), log=log), log)
    assert log.read_text().count("report   ") == 1
    assert len(list(out.with_suffix(".images").glob("*/*/costs-1.jsonl"))) == 2  # the second drew of both rows
    for row, want in zip(json.loads(out.read_text())["rows"], evaluated["rows"], strict=True):
        for name, figure in row["metrics"].items():
            assert figure["value"] == pytest.approx(want["metrics"][name]["value"], rel=1e-6)
            assert figure["stderr"] == pytest.approx(want["metrics"][name]["stderr"], rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "layer"), [("unet", "conv_out.bias"), ("vae", "decoder.conv_out.bias"), ("scheduler", "")]
)
def test_images_of_a_pipeline_that_changed_are_drawn_anew(setting: Setting, tmp_path: Path, changed: str, layer: str):
    """Its network, as of a student that was trained again, its autoencoder, or its scheduler's settings."""
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(setting.teacher, tmp_path / "z"))
    out = tmp_path / "report.json"
    assert run(*setting.command(out, "pixel_distance", source=source)).code == 0
    before = {f: f.stat().st_mtime_ns for f in out.with_suffix(".images").rglob("*.png")}
    assert run(*setting.command(out, "pixel_distance", source=source)).code == 0
    assert {f: f.stat().st_mtime_ns for f in out.with_suffix(".images").rglob("*.png")} == before
    if layer:
        file = source / changed / "diffusion_pytorch_model.safetensors"
        save_file({k: v + 0.5 * (k == layer) for k, v in load_file(file).items()}, file, {"format": "pt"})
    else:
        file = source / "scheduler/scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    assert run(*setting.command(out, "pixel_distance", source=source)).code == 0
    assert len(list(out.with_suffix(".images").rglob("*.png"))) == 2 * len(before)


def first_four(images: list[Path], to: Path) -> Path:
    """A folder with copies of the first of them: Inception takes its time."""
    to.mkdir()
    for image in images[:4]:
        shutil.copy(image, to)
    return to


def test_fid_of_a_folder_to_a_file_of_statistics(
    evaluated: dict[str, Any],
    setting: Setting,
    tmp_path: Path,
    inception_weights: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    """A folder is a source; its FID to `fewstep stats` of another is the distance of their features, and so it is to mu
    and sigma alone, as pytorch-fid and ADM publish them.

    Of so few features X = A^T A and Y = B^T B, tr (XY)^(1/2) is the sum of the singular values of A B^T.
    """
    from fewstep.metrics.features import extract
    from fewstep.metrics.inception import Inception
    from fewstep.metrics.mmd import kid

    monkeypatch.setattr("fewstep.distill.seen.GROUPS", 1)  # an error would take ten more distances
    folder = first_four(images_of(setting.folder / "whole" / "report.json", "1-step"), tmp_path / "few")
    real = first_four(sorted(setting.reference.iterdir()), tmp_path / "real")
    npz, published, out = tmp_path / "reference.npz", tmp_path / "published.npz", tmp_path / "report.json"
    weights = ("--inception-weights", inception_weights)
    answer = run("stats", real, "--out", npz, *weights)
    assert (answer.code, answer.err) == (0, "")
    assert "4 images, inception-2048-tf1" in answer.out
    with np.load(npz) as file:
        np.savez(published, mu=file["mu"], sigma=file["sigma"])
    x, y = (extract(Inception(weights=inception_weights), f).double() for f in (folder, real))
    a, b = ((v - v.mean(0)) / 3**0.5 for v in (x, y))
    spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    fid = (x.mean(0) - y.mean(0)).square().sum() + spread
    for names, reference, want in (
        ("fid", published, {"fid": fid.item()}),
        ("kid", real, {"kid": kid(x, y, size=4)[0]}),
    ):
        command = setting.command(out, names, "--reference", reference, *weights, source=folder)
        assert run(*command).code == 0
        report = json.loads(out.read_text())
        (row,) = report["rows"]
        assert (row["role"], row["n"], row["nfe"]) == ("folder", 4, None)
        assert values(row) == pytest.approx(want, rel=1e-5)
        assert report["networks"]["inception"].startswith("inception-2048-tf1")
    assert f"| {folder.name}, 4 images | -   | -       |" in out.with_suffix(".md").read_text()


def test_kid_is_of_subsets_as_published(monkeypatch: pytest.MonkeyPatch):
    """Of torch-fidelity's size where both sets have so many images, and else of all in the smaller one."""
    from torch_fidelity.defaults import DEFAULTS

    from fewstep.distill.judges import Judges
    from fewstep.distill.metric_names import Weights
    from fewstep.distill.seen import Seen, figures
    from fewstep.metrics.features import Kept

    def seen(n: int) -> Seen:
        kept = Kept()
        kept.update(torch.zeros(n, 1))
        return Seen(kept={"inception": kept})

    monkeypatch.setattr("fewstep.metrics.mmd.kid", lambda x, y, size: (size, 0.0))  # the size it is asked for
    for n, m, size in ((30, 1200, 30), (1200, 30, 30), (1100, 1200, DEFAULTS["kid_subset_size"])):
        found, _ = figures(["kid"], seen(n), Judges(Weights()), reference=seen(m))
        assert found == {"kid": (size, 0.0)}


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


def test_the_list_of_metrics_names_each_once(fewstep: Command):
    from fewstep.distill.metric_names import METRICS as KNOWN

    answer = fewstep("metrics")
    assert [line.split()[0] for line in answer.out.splitlines()[1:]] == list(KNOWN)
