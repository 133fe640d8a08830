"""What a run leaves behind, and what may be done with a folder that holds one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
import torch
import yaml
from accelerate.utils import LoggerType
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.distill.config import TrainConfig
from fewstep.distill.record import MAY_CHANGE, check_tracker, locked, refuse_changes
from fewstep.distill.regression_config import RegressionConfig
from fewstep.samplers.errors import UserError
from tests.distill.gaussian import PROCESSES, Teacher, method, under_training
from tests.distill.runs import Scripted, bad, config, metrics, scripted, square


def test_metrics_hold_the_latest_of_every_role(tmp_path: Path):
    """Every logging_steps and at the end; a role that did not step is not left out; resume writes the same lines."""
    every = {"student": 3}
    changes = {"max_train_steps": 7, "logging_steps": 2, "checkpointing_steps": 4}
    scripted(tmp_path / "a", Scripted({"student": square, "fake_score": square}, every=every), **changes).run()
    lines = metrics(tmp_path / "a/run")
    assert [line["iteration"] for line in lines] == [2, 4, 6, 7]
    wanted = {f"{role}/{what}" for role in ("student", "fake_score") for what in ("loss", "grad_norm")}
    assert all(line.keys() == {"iteration", "learning_rate"} | wanted for line in lines)
    steps = [line["student/loss"] for line in lines]  # in iterations 1, 4 and 7
    assert len(set(steps)) == 3
    assert steps[1] == steps[2]

    stopped = Scripted({"student": square, "fake_score": bad("loss", 5)}, every=every)
    with pytest.raises(UserError):
        scripted(tmp_path / "b", stopped, **changes).run()
    method = Scripted({"student": square, "fake_score": square}, every=every)
    scripted(tmp_path / "b", method, resume=True, **changes).run()
    assert metrics(tmp_path / "b/run") == lines


def test_the_best_checkpoint_is_kept(tmp_path: Path):
    """The lowest of the metric at a checkpoint, beside the last ones; also through a resume."""

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        return w.sum() * 0 + abs(iteration - 3) + 1  # lowest in iteration 4

    changes = {"best_metric": "student/loss", "max_train_steps": 12, "checkpoints_total_limit": 1}
    run = scripted(tmp_path, Scripted({"student": loss}), **changes)
    run.config = run.config.model_copy(update={"max_train_steps": 6})
    run.run()
    resumed = scripted(tmp_path, Scripted({"student": loss}), resume=True, **changes)
    resumed.run()
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-000004", "step-000012"]
    assert resumed.best == (1.0, 4)


def test_a_metric_that_nobody_logs_is_refused_at_the_first_line(tmp_path: Path):
    run = scripted(tmp_path, Scripted({"student": square}), best_metric="student/los")
    with pytest.raises(UserError, match="best_metric student/los: never logged; logged: student/grad_norm, student/l"):
        run.run()
    assert run.iteration == 1


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"method": "dmd2", "guidance_scale": 2.0}, 2.0),
        ({"method": "dmd2", "guidance_scale": 2.0, "validation_guidance_scale": 3.0}, 3.0),
        ({"method": "pretrain"}, 1.0),
    ],
)
def test_the_previews_teacher_is_guided_as_in_training(
    changes: dict[str, Any], wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Unless `validation_guidance_scale` says another; the student's rows need none."""
    teacher = Teacher(PROCESSES["flow"], [0.7], [0.5])
    made = method(tmp_path, teacher, **changes)
    record = under_training(tmp_path, made, teacher, ["0.4"]).record
    record.previews(teacher, teacher.encode(["0.4"]))
    scales, guided = list[float](), teacher.guided_x0
    monkeypatch.setattr(teacher, "guided_x0", lambda *args: scales.append(args[3]) or guided(*args))
    record.preview(made, made.student.denoiser, 1)
    assert scales == [wanted] * 20


def test_resume_without_a_whole_checkpoint_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Killed before the first one, or all torn: it says so, and lines that were logged come once."""
    straight = Scripted({"student": square})
    scripted(tmp_path / "straight", straight).run()
    with pytest.raises(UserError):
        scripted(tmp_path, Scripted({"student": bad("loss", 3)})).run()
    (tmp_path / "run/checkpoints/step-000002/manifest.json").unlink()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "stud')  # a line torn by a kill
    capsys.readouterr()
    resumed = Scripted({"student": square})
    scripted(tmp_path, resumed, resume=True).run()
    said = capsys.readouterr().err
    assert "step-000002: incomplete (FileNotFoundError); passed over" in said
    assert f"no whole checkpoint in {tmp_path / 'run/checkpoints'}: starting at iteration 0" in said
    lost = (tmp_path / "run/metrics.lost.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lost[:-1]] == [1, 2, 3]  # what it told is kept
    assert resumed.weights["student"].equal(straight.weights["student"])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight/run")


def test_seconds_go_on_after_a_resume(tmp_path: Path):
    with pytest.raises(UserError):
        scripted(tmp_path, Scripted({"student": bad("loss", 3)})).run()
    path = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"seconds": 1000.0 * line["iteration"]}) + "\n" for line in lines))
    scripted(tmp_path, Scripted({"student": square}), resume=True).run()
    seconds = {line["iteration"]: line["seconds"] for line in map(json.loads, path.read_text().splitlines())}
    assert (seconds[1], seconds[2]) == (1000, 2000)
    assert 2000 <= seconds[3] <= seconds[4] < 2100


def test_a_run_is_not_started_over_another(tmp_path: Path):
    """Nor resumed with other values of what its numbers depend on; each such key is named."""
    scripted(tmp_path, Scripted({"student": square})).run()
    with pytest.raises(UserError, match=r"run: holds a run already; --resume continues it, name=OTHER starts another"):
        scripted(tmp_path, Scripted({"student": square}))
    with pytest.raises(UserError, match=r"other values of seed \(was 0, now 1\), learning_rate \(was 0.01, now 0.02\)"):
        scripted(tmp_path, Scripted({"student": square}), resume=True, seed=1, learning_rate=0.02)
    longer = scripted(tmp_path, Scripted({"student": square}), resume=True, max_train_steps=8, logging_steps=2)
    longer.run()
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 8]
    assert RegressionConfig.model_fields.keys() | TrainConfig.model_fields.keys() >= MAY_CHANGE


@pytest.mark.parametrize("name", ["config.yaml", "student/photo.txt", "report.json"])
def test_what_no_run_wrote_is_left_alone(tmp_path: Path, name: str):
    """A user's own files in a folder of the run's name, CONFIG itself among them."""
    own = tmp_path / "run" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(
        UserError, match=rf"run: has a {name.split('/')[0]} that is no run's; say name=OTHER, or another"
    ):
        scripted(tmp_path, Scripted({"student": square}))
    assert own.read_text() == "mine"


@pytest.mark.parametrize("text", [None, "", "a: [1", "- a", "\xff\xfe"])
def test_a_run_without_its_config_is_not_resumed(tmp_path: Path, text: str | None):
    """Nor is another written in its place, which would be taken for what it was trained with."""
    scripted(tmp_path, Scripted({"student": square})).run()
    config = tmp_path / "run/config.yaml"
    config.unlink() if text is None else config.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml: no longer the config of a run"):
        scripted(tmp_path, Scripted({"student": square}), resume=True, seed=1)
    assert (config.read_bytes() if config.exists() else None) == (None if text is None else text.encode("latin-1"))


def test_one_run_at_a_time_trains_in_a_folder(tmp_path: Path):
    with locked(tmp_path / "run"):
        second = locked(tmp_path / "run")
        with pytest.raises(UserError, match=r"run: a run is training there; wait for it, or say name=OTHER"):
            second.__enter__()
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_an_iteration_keeps_its_rows(tmp_path: Path):
    """However they are split: as micro-batches the second half ends where the first run did. Otherwise both products are said."""
    straight = Scripted({"student": square})
    scripted(tmp_path / "straight", straight).run()
    scripted(tmp_path, Scripted({"student": square}), max_train_steps=3).run()
    with pytest.raises(UserError, match=r"gradient_accumulation_steps x processes was 4 x 1 x 1, now 8 x 1 x 1"):
        scripted(tmp_path, Scripted({"student": square}), resume=True, train_batch_size=8)
    environment = tmp_path / "run/environment.json"
    of_one = environment.read_text()
    environment.write_text(json.dumps(json.loads(of_one) | {"processes": 2}))
    with pytest.raises(UserError, match=r"was 4 x 1 x 2, now 4 x 1 x 1"):
        scripted(tmp_path, Scripted({"student": square}), resume=True)
    environment.write_text(json.dumps(json.loads(of_one) | {"processes": "two"}))
    scripted(tmp_path, Scripted({"student": square}), resume=True)  # no number: nothing to hold it to
    environment.write_text(of_one)
    split = Scripted({"student": square})
    scripted(tmp_path, split, resume=True, train_batch_size=1, gradient_accumulation_steps=4).run()
    assert {entry[2] for entry in split.log if entry[0] == "draw"} == {(0,), (1,), (2,), (3,)}
    torch.testing.assert_close(split.weights["student"], straight.weights["student"], rtol=1e-5, atol=0)


def test_a_folder_where_nothing_was_trained_holds_no_run(tmp_path: Path):
    """The first attempt ended before its first iteration: a mistake is corrected without a new name."""
    scripted(tmp_path, Scripted({"student": square}), seed=1)
    assert (tmp_path / "run/config.yaml").is_file()
    scripted(tmp_path, Scripted({"student": square}), seed=2).run()


def test_a_run_whose_folder_could_not_be_written_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that is full before the config is written: what stands there is a run's, and not a stranger's."""
    write = checkpoint.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "environment.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(UserError, match="cannot be written"):
        scripted(tmp_path, Scripted({"student": square}))
    monkeypatch.undo()
    scripted(tmp_path, Scripted({"student": square})).run()


def test_a_resumed_run_has_the_data_that_it_began_with(tmp_path: Path):
    """A file of prompts that was written anew is other data under the same name."""
    run = scripted(tmp_path, Scripted({"student": square}))
    run.record.same_data(["a", "b"], 2)
    run.run()
    again = scripted(tmp_path, Scripted({"student": square}), resume=True).record
    again.same_data(["a", "b"], 2)
    for captions, samples in ((["a", "c"], 2), (["a", "b"], 3)):
        with pytest.raises(UserError, match="run: cannot be resumed with other samples or captions"):
            again.same_data(captions, samples)


def test_phases_in_sequence_keep_their_length(tmp_path: Path):
    settings = config(tmp_path, method="phased_dmd", steps=[2], max_train_steps=4)
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    longer = {"max_train_steps": 8}
    with pytest.raises(UserError, match=r"other values of max_train_steps \(was 4, now 8\)"):
        refuse_changes(settings.run_dir, settings.model_copy(update=longer))
    turns = settings.model_copy(update={"phase_order": "alternating"})
    (settings.run_dir / "config.yaml").write_text(yaml.safe_dump(turns.model_dump(mode="json")))
    refuse_changes(settings.run_dir, turns.model_copy(update=longer))


def test_a_tracker_is_known_and_installed(monkeypatch: pytest.MonkeyPatch):
    """Accelerate leaves one out without a word whose package is missing."""
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    check_tracker(None)
    check_tracker("tensorboard")
    with pytest.raises(UserError, match="report_to wandb: its package is not installed; try: pip install wandb"):
        check_tracker("wandb")
    with pytest.raises(UserError, match=r"report_to tensorbord: no tracker of accelerate; known: .*tensorboard"):
        check_tracker("tensorbord")
