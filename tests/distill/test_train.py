"""`train` on a tiny Stable Diffusion pipeline: from a folder of images to an artifact."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import load_file

from fewstep.distill import run
from fewstep.distill.config import ConfigError
from fewstep.distill.record import Record
from fewstep.distill.run import train
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import sample
from tests.distill.runs import config, metrics, write_images
from tests.pipelines import tiny_stable_diffusion

SMALL = {"max_train_steps": 2, "train_batch_size": 2, "checkpointing_steps": 1, "steps": [1, 2], "method": "lcm"}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """A config on a folder of pictures, with changes."""
    images = write_images(tmp_path / "images", 5)
    return lambda **changes: config(tmp_path, train_data=str(images), **(SMALL | changes))


def teacher() -> Denoiser:
    return denoiser_of(tiny_stable_diffusion())


def last(folder: Path) -> dict[str, str]:
    """Hash of each file of a run's last checkpoint."""
    return json.loads((folder / "checkpoints/step-000002/manifest.json").read_text())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_previews_change_nothing(settings: Callable[..., Any], kind: str):
    """A row of the teacher and one for each step count, the same noise; training goes on as if none had been made."""
    shown = {"validation_steps": 1, "validation_prompts": ["a cat", "a dog", "a"], "validation_guidance_scale": 3.0}
    plain, previewed = ({"student": kind, "ema_decay": 0.9, "name": name} for name in ("plain", "previewed"))
    without, folder = (train(settings(**c), teacher=teacher()) for c in (plain, previewed | shown))
    assert last(folder) == last(without)
    assert metrics(folder) == metrics(without)
    assert not (without / "samples").exists()
    pictures = {p.name: np.array(Image.open(p)) for p in (folder / "samples").iterdir()}
    assert sorted(pictures) == ["step-000001.png", "step-000002.png"]
    first, second = (pictures[name] for name in sorted(pictures))
    assert first.shape == (3 * 16 + 4 * 2, 3 * 16 + 4 * 2, 3)  # with two pixels between and around
    assert (first[:18] == second[:18]).all()  # the teacher's
    assert (first[20:] != second[20:]).any()


def test_pictures_are_drawn_in_the_precision_of_training(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Kernels of half precision take nothing else; the decoder keeps its own."""
    seen: list[bool] = []

    def noting(*arguments: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return sample(*arguments)

    for module in ("record", "in_training"):
        monkeypatch.setattr(f"fewstep.distill.{module}.sample", noting)
    shown = {"validation_prompts": ["a cat"], "eval_steps": 2, "eval_num": 4, "eval_metrics": ["pixel_distance"]}
    for precision in ("bf16", "no"):
        seen.clear()
        train(settings(mixed_precision=precision, name=precision, **shown), teacher=teacher())
        assert seen == [precision == "bf16"] * 5  # two judged batches; the teacher's picture, and the student's two


def test_a_report_finds_the_memory_of_training_free(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither weights nor moments of the run are held when two pipelines are about to load, whoever holds whom."""
    tiny_stable_diffusion(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    held: list[weakref.ref[Any]] = []
    save = run.Trainer.save

    def noting(self: Any) -> None:
        if not held:
            held.extend(weakref.ref(p) for role in self.roles.values() for p in role.parameters.values())
            held.extend(weakref.ref(m) for role in self.roles.values() for m in role.denoiser.networks.values())
            held.extend(weakref.ref(s["exp_avg"]) for s in self.optimizers["student"].state.values())
        save(self)

    alive: list[int] = []
    monkeypatch.setattr(run.Trainer, "save", noting)
    monkeypatch.setattr(run.report, "report_run", lambda *_: alive.append(sum(r() is not None for r in held)))
    shown = {"validation_prompts": ["a cat"], "report_num": 4, "report_prompts": [str(tmp_path / "prompts.txt")]}
    train(settings(student="full", teacher=str(tmp_path / "teacher"), gradient_checkpointing=True, **shown))
    assert len(held) > 100
    assert alive == [0]


def test_averages_of_a_lora_are_of_the_lora_alone(settings: Callable[..., Any]):
    """What is exported is the moving average; a hundredth of the network's numbers are kept, not all."""
    folder = train(settings(student="lora", rank=2, ema_decay=0.9), teacher=teacher())
    average, student = (load_file(folder / f"checkpoints/step-000002/{n}.safetensors") for n in ("average", "student"))
    assert average.keys() == student.keys()
    assert all(".lora_A." in key or ".lora_B." in key for key in average)
    exported = load_file(folder / "student/pytorch_lora_weights.safetensors")
    assert len(exported) == len(average)
    values = {k.removeprefix("unet."): v for k, v in exported.items()}
    assert all(values[k.removeprefix("unet.")].equal(v) for k, v in average.items())
    assert any(not average[k].equal(student[k]) for k in average)


def test_text_and_images_are_encoded_once(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Once each for all runs; while training, text encoder and autoencoder are not asked."""
    train(settings(name="first"), teacher=teacher())
    other = teacher()
    for name in ("encode", "to_latents"):
        monkeypatch.setattr(other, name, None)
    folder = train(settings(name="second", preflight=False), teacher=other)
    assert last(folder) == last(folder.with_name("first"))


def test_precision_may_change_from_run_to_run(settings: Callable[..., Any]):
    """In one process, as in a notebook."""
    folders = [
        train(settings(name=name, mixed_precision=name, student="full"), teacher=teacher()) for name in ("no", "bf16")
    ]
    losses = [metrics(folder)[-1]["student/loss"] for folder in folders]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(
        v.dtype == torch.float32 for v in load_file(folders[1] / "checkpoints/step-000002/student.safetensors").values()
    )


class Kept(accelerate.tracking.GeneralTracker):
    """A tracker of accelerate's that keeps what it is given."""

    name, requires_logging_directory = "tensorboard", True
    made: ClassVar[list[Kept]] = []

    def __init__(self, project: str, folder: str):
        self.tracker, self.project, self.folder = self, project, folder
        super().__init__()  # which asks for them
        self.lines: list[dict[str, float]] = []
        self.ended = False
        self.made.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing is asked of it."""

    def log(self, values: dict[str, float], step: int | None = None, **rest: Any) -> None:
        self.lines.append({"iteration": step or 0, **values})

    def finish(self) -> None:
        self.ended = True


def test_a_longer_run_that_was_stopped_before_its_student_writes_it(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """The student of the shorter run lies there, and the last checkpoint is whole."""
    straight = train(settings(name="straight", max_train_steps=2), teacher=teacher())
    folder = train(settings(max_train_steps=1), teacher=teacher())

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "preview", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(settings(max_train_steps=2), resume=True, teacher=teacher())
    train(settings(max_train_steps=2), resume=True, teacher=teacher())
    states = [load_file(run / "student/pytorch_lora_weights.safetensors") for run in (folder, straight)]
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())


@pytest.mark.parametrize("damage", ["student", "report"])
def test_what_was_damaged_after_a_run_is_written_again(settings: Callable[..., Any], tmp_path: Path, damage: str):
    """The weights of its student, cut off; its report, empty."""
    tiny_stable_diffusion(tmp_path / "base")
    told = settings(teacher=str(tmp_path / "base"), report_num=2, report_teacher_steps=[1])
    folder = train(told)
    file = folder / {"student": "student/pytorch_lora_weights.safetensors", "report": "report.json"}[damage]
    before = {k: v.clone() for k, v in load_file(file).items()} if damage == "student" else {}
    os.truncate(file, file.stat().st_size // 2 if damage == "student" else 0)
    train(told, resume=True)
    if damage == "student":
        assert all(torch.equal(v, before[k]) for k, v in load_file(file).items())
    else:
        assert json.loads(file.read_text())["n"] == 2


def test_targets_that_are_not_there_are_one_line(settings: Callable[..., Any]):
    with pytest.raises(UserError, match="target_modules: UNet2DConditionModel: "):
        train(settings(student="lora", target_modules=["nosuch"]), teacher=teacher())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resolution": 128}, "at 64x64 pixels, and this run is at 128x128"),
        ({"aspect_ratio_buckets": True}, "in one size"),
    ],
)
def test_drawings_have_one_size(tmp_path: Path, changes: dict[str, Any], said: str):
    own = {"train_data": "embedded:emoji", "teacher": "embedded:emoji", "num_samples": 4, **SMALL}
    with pytest.raises(ConfigError, match=f"train_data: embedded:emoji is drawn {said}"):
        train(config(tmp_path, **own | changes))


def test_a_tracker_gets_what_is_logged(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Made by accelerate from its name, with the run's folder; every line of metrics.jsonl reaches it, then it is closed."""
    monkeypatch.setattr(Kept, "made", [])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    folder = train(settings(report_to="tensorboard", preflight=False), teacher=teacher())
    (tracker,) = Kept.made
    assert (tracker.project, Path(tracker.folder), tracker.ended) == ("fewstep", folder, True)
    assert tracker.lines == metrics(folder)
    assert [line["iteration"] for line in tracker.lines] == [1, 2]
    assert all(line["student/loss"] > 0 for line in tracker.lines)


def test_what_is_missing_is_refused_before_weights_load(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Images for a method that learns from them, prompts for one that needs them, and prompts in the file."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(run, "load", loaded)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    (tmp_path / "empty.txt").write_text("\n \n")
    nothing = {"train_data": None, "prompts": None}
    for changes, message in [
        (nothing, "train_data: missing; method lcm learns from images or clips with captions"),
        (nothing | {"method": "dmd2"}, "prompts: missing; method dmd2 needs prompts"),
        (nothing | {"method": "dmd2", "prompts": str(tmp_path / "empty.txt")}, "the file holds no prompt"),
        (nothing | {"method": "dmd2", "prompts": str(tmp_path / "none.txt")}, "cannot be read as text"),
        ({"teacher": str(tmp_path / "none")}, "no such folder"),
        (
            {"teacher": "some/model+some/lora"},
            "teacher: a pipeline with a LoRA, or another network; save it whole first",
        ),
        ({"report_to": "tensorbord"}, "report_to tensorbord: no tracker of accelerate; known: .*tensorboard, .*wandb"),
        ({"report_to": "tensorboard"}, "report_to tensorboard: its package is not installed"),
    ]:
        with pytest.raises((ConfigError, UserError), match=message):
            train(config(tmp_path, **(SMALL | {"train_data": str(tmp_path / "images")} | changes)))
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_one_line(settings: Callable[..., Any], tmp_path: Path):
    """Named; corrected, the same command runs."""
    broken = settings()
    good = (tmp_path / "images/3.png").read_bytes()
    os.truncate(tmp_path / "images/3.png", len(good) // 2)
    with pytest.raises(UserError, match=r"images/3.png: cannot be read as an image"):
        train(broken, teacher=teacher())
    (tmp_path / "images/3.png").write_bytes(good)
    assert len(metrics(train(broken, teacher=teacher()))) == 2
