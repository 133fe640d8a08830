"""`--revision` and `--variant`: the hub's repository that a source is, or the base of a student, in each command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.app.sources import load_source
from fewstep.samplers.load import load
from tests.app.conftest import Answer
from tests.hub import keep, move
from tests.pipelines import tiny_stable_diffusion

Command = Callable[..., Answer]
NAME = "org/tiny"


@dataclass
class Hub:
    """Its cache, the commit of each branch, and its branches as folders."""

    cache: Path
    commits: dict[str, str]
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """Two branches with different weights; `main` also as a variant, with those of the other."""
    cache = tmp_path_factory.mktemp("hub")
    folders = {"main": cache / "main", "old": cache / "old"}
    tiny_stable_diffusion(folders["main"])
    other = tiny_stable_diffusion()
    for p in other.unet.parameters():
        p.mul_(0.9)
    other.save_pretrained(folders["old"])
    other.unet.save_pretrained(folders["main"] / "unet", variant="fp16")
    with pytest.MonkeyPatch.context() as patch:
        yield Hub(cache, keep(cache, NAME, folders, patch), folders)


def drawn(fewstep: Command, out: Path, *arguments: object) -> bytes:
    answer = fewstep("sample", *arguments, "-p", "a cat", "-n", 1, "--steps", 2, "--out", out)
    assert answer.code == 0, answer.err
    return Image.open(out).tobytes()


def test_sample_and_evaluate_draw_with_the_weights_asked_for(fewstep: Command, hub: Hub, tmp_path: Path):
    """The pixels of the folder that a branch is; images of one revision do not stand for another's."""
    asked = {"main": (), "old": ("--revision", "old"), "variant": ("--variant", "fp16")}
    pixels = {name: drawn(fewstep, tmp_path / "x.png", NAME, *how) for name, how in asked.items()}
    for name, folder in hub.folders.items():
        assert pixels[name] == drawn(fewstep, tmp_path / "x.png", folder)
    assert pixels["variant"] == pixels["old"] != pixels["main"]

    prompts, out = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("a cat\na dog")
    shared = ("--steps", 2, "-n", 4, "--prompts", prompts, "--metrics", "pixel_distance", "--out", out)
    found = {}
    for name, how in asked.items():
        answer = fewstep("evaluate", NAME, *how, *shared)
        assert answer.code == 0, answer.err
        report = json.loads(out.read_text())
        assert {k: v for k, v in report.items() if k in ("revision", "variant")} == dict(
            zip([h[2:] for h in how[::2]], how[1::2], strict=True)
        )
        (row,) = report["rows"]
        found[name] = row["metrics"]
    assert found["variant"] == found["old"] != found["main"]


def test_playground_shows_the_weights_asked_for(hub: Hub):
    old = load(hub.folders["old"]).network.conv_in.weight
    for source in (load_source(NAME, "old"), load_source(NAME, None, "fp16")):
        assert torch.equal(source.teacher.pipeline.unet.conv_in.weight, old)


def test_a_student_keeps_its_revision_and_can_be_told_it(fewstep: Command, config: Path, hub: Hub, tmp_path: Path):
    """What it was trained on, also when the branch has moved on; a base of other weights is refused, as ever."""
    quick = ("max_train_steps=1", "report_num=null", "validation_steps=null", "preflight=false", "steps=[2]")
    for folder, said in (("told", f"revision={hub.commits['old']}"), ("branch", "revision=null")):
        answer = fewstep("train", config, f"teacher={NAME}", said, f"output_dir={tmp_path / folder}", *quick)
        assert answer.code == 0, answer.err
    told, branch = tmp_path / "told" / "tiny", tmp_path / "branch" / "tiny"
    assert json.loads((told / "student" / "fewstep.json").read_text())["revision"] == hub.commits["old"]

    first = drawn(fewstep, tmp_path / "x.png", branch)
    move(hub.cache, NAME, "main", hub.commits["old"])
    try:
        answer = fewstep("sample", branch, "-p", "a cat", "--steps", 2, "--out", tmp_path / "x.png")
        assert (answer.code, "a LoRA of another base" in answer.err) == (2, True)
        was = ("--revision", hub.commits["main"])
        assert drawn(fewstep, tmp_path / "x.png", branch, *was) == first
        drawn(fewstep, tmp_path / "x.png", told)
        out = tmp_path / "fused"
        assert "a LoRA of another base" in fewstep("export", branch, out, "--format", "fused").err
        assert fewstep("export", branch, out, "--format", "fused", *was).code == 0
        assert drawn(fewstep, tmp_path / "x.png", out) == first
        source = load_source(str(branch), hub.commits["main"])
        assert torch.equal(
            source.teacher.pipeline.unet.conv_in.weight, load(hub.folders["main"]).network.conv_in.weight
        )
    finally:
        move(hub.cache, NAME, "main", hub.commits["main"])
    for command, option in (("sample", "--revision"), ("sample", "--variant"), ("export", "--variant")):
        where = [branch, tmp_path / "copy"] if command == "export" else [out, "-p", "a cat", "--steps", 2]
        answer = fewstep(command, *where, option, "fp16")
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert f"{option} fp16: " in answer.err
        assert answer.err.endswith("; leave it out\n")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_student_of_the_hub_is_sampled_as_one(fewstep: Command, config: Path, hub: Hub, tmp_path: Path, kind: str):
    """By its own plan, from the files of its repository, as from the folder that was pushed."""
    quick = ("max_train_steps=1", "report_num=null", "validation_steps=null", "preflight=false", "steps=[2]")
    told = (f"teacher={hub.folders['main']}", f"student={kind}", f"output_dir={tmp_path}", *quick)
    answer = fewstep("train", config, *told)
    assert answer.code == 0, answer.err
    name, folder = f"me/fruit-{kind}", tmp_path / "tiny/student"
    with pytest.MonkeyPatch.context() as patch:
        keep(hub.cache, name, {"main": folder}, patch)
        assert drawn(fewstep, tmp_path / "x.png", name) == drawn(fewstep, tmp_path / "x.png", folder)
        answer = fewstep("sample", name, "-p", "a cat", "--steps", 3, "--out", tmp_path / "x.png")
        assert (answer.code, "steps 3: this student samples in 2 steps" in answer.err) == (2, True), answer.err


@pytest.mark.parametrize("command", ["sample", "evaluate", "playground", "export", "train"])
def test_a_folder_has_no_revision(
    command: str, fewstep: Command, config: Path, trained: Path, hub: Hub, tmp_path: Path
):
    """diffusers would not say that it is not used."""
    folder = trained if command == "export" else hub.folders["main"]
    own = {"sample": ("-p", "a cat"), "export": (tmp_path / "out", "--format", "fused")}.get(command, ())
    said = f"--revision old: of a repository of the hub; {folder}: on this disk, without any\n"
    answer = fewstep(command, folder, *own, "--revision", "old") if command != "train" else None
    if answer is None:
        said = f"revision old: of a repository of the hub; {folder} is a folder\n"
        answer = fewstep("train", config, f"teacher={folder}", "revision=old", f"output_dir={tmp_path}")
    assert (answer.code, answer.err) == (2, said)
    assert not (tmp_path / "out").exists()
