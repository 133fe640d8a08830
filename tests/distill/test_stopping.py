"""How a run ends before its time: a number that is not finite, a signal, a full disk; and what is left then."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill import checkpoint, interrupt
from fewstep.distill.trainer import Interrupted, Trainer
from fewstep.samplers.errors import UserError
from tests.distill import runs
from tests.distill.runs import Scripted, bad, metrics, scripted, square


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_number_stops_the_run(tmp_path: Path, kind: str):
    """With iteration (counted as in metrics.jsonl), role and last good checkpoint; the weights stay as they were."""
    method = Scripted({"student": square, "fake_score": bad(kind, 4)})
    run = scripted(tmp_path, method)
    before = {}
    run.method.after_step = lambda role, i, scalars: before.update({role: method.weights[role].tolist()})  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        run.run()
    assert str(caught.value) == (
        f"iteration 5: the {kind} of fake_score is not finite; "
        f"the last good checkpoint is {tmp_path / 'run/checkpoints/step-000004'}. Try a lower learning_rate"
    )
    assert method.weights["fake_score"].tolist() == before["fake_score"]
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_non_finite_number_before_any_checkpoint(tmp_path: Path):
    run = scripted(tmp_path, Scripted({"student": bad("loss", 0)}), gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"iteration 1: the loss of student .* no checkpoint was written yet"):
        run.run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_the_run_after_a_whole_iteration(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
):
    """In the middle of an accumulation: the iteration is finished, a checkpoint written, and a line says how to go on."""
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        if iteration == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as from a terminal and from a launcher
        return square(w, draws, iteration)

    run = scripted(tmp_path, Scripted({"student": loss}), gradient_accumulation_steps=2, checkpointing_steps=100)
    with pytest.raises(Interrupted) as caught:
        run.run()
    assert str(caught.value) == "stopped at iteration 3 of 6; go on with --resume"
    assert capfd.readouterr().err.splitlines() == ["stopping after this iteration; once more stops at once"]
    assert checkpoint.latest(tmp_path / "run/checkpoints")[0] == tmp_path / "run/checkpoints/step-000003"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    straight, resumed = Scripted({"student": square}), Scripted({"student": square})
    changes = {"gradient_accumulation_steps": 2, "checkpointing_steps": 100}
    scripted(tmp_path / "straight", straight, **changes).run()
    scripted(tmp_path, resumed, resume=True, **changes).run()
    assert resumed.weights["student"].equal(straight.weights["student"])
    assert resumed.memory == straight.memory
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight/run")


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Later than the second that one Ctrl-C may need to come twice."""
    heard: list[int] = []

    def clock() -> float:
        heard.append(0)
        return 2.0 * len(heard)

    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=clock))  # of this module alone
    done = []

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append(iteration)
        return square(w, draws, iteration)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            scripted(tmp_path, Scripted({"student": loss})).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == []


def test_a_signal_in_the_last_iteration_ends_the_run_too(tmp_path: Path):
    """Else what follows, several students maybe, would go on as if nothing had been said."""

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        if iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return square(w, draws, iteration)

    run = scripted(tmp_path, Scripted({"student": loss}))
    with pytest.raises(Interrupted, match="stopped at iteration 6 of 6; go on with --resume"):
        run.run()
    assert checkpoint.latest(tmp_path / "run/checkpoints")[0] == tmp_path / "run/checkpoints/step-000006"


def test_a_signal_while_a_checkpoint_is_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = scripted(tmp_path, Scripted({"student": square}), checkpointing_steps=2)
    saved = Trainer.save

    def save(trainer: Trainer) -> None:
        saved(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "save", save)
    with pytest.raises(Interrupted, match="stopped at iteration 2 of 6"):
        run.run()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_full_disk_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Whatever was being written; the checkpoint before is whole, and the run resumes from it."""
    run = scripted(tmp_path, Scripted({"student": square}))
    opened, made = Path.open, Path.mkdir

    def full(path: Path) -> None:
        if run.iteration == 4 and name in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def open_(self: Path, *args: Any, **kwargs: Any) -> Any:
        full(self)
        return opened(self, *args, **kwargs)

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        full(self)
        made(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            run.run()
    assert checkpoint.latest(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/step-000002", [])
    resumed, straight = Scripted({"student": square}), Scripted({"student": square})
    scripted(tmp_path, resumed, resume=True).run()
    scripted(tmp_path / "straight", straight).run()
    assert resumed.weights["student"].equal(straight.weights["student"])


class Scaled(runs.Accelerator):
    """Accelerate on a CPU with the gradient scaler that it has on a GPU."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True  # type: ignore[attr-defined]


def test_a_skip_by_the_scaler_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights, averages and the method stay; the scale is halved, and is part of a checkpoint; other steps are plain."""
    monkeypatch.setattr(runs, "Accelerator", Scaled)
    changes = {"mixed_precision": "fp16", "ema_decay": 0.9}
    method, plain = (Scripted({"student": bad("gradient", 2)}) for _ in range(2))
    seen = []
    run = scripted(tmp_path, method, **changes)
    run.record.log = lambda i, values: seen.append((method.weights["student"].tolist(), run.average["w"].tolist()))  # type: ignore[index, method-assign]
    run.run()
    assert run.skipped == 1
    assert [entry[1] for entry in method.log if entry[0] == "after_step"] == [0, 1, 3, 4, 5]
    assert seen[2] == seen[1] != seen[3]
    _, meta = checkpoint.load(tmp_path / "run/checkpoints/step-000006")
    assert (meta["skipped"], meta["scaler"]["scale"]) == (1, 512.0)
    resumed = scripted(tmp_path, plain, resume=True, **changes, logging_steps=1)
    assert (resumed.skipped, resumed.accelerator.scaler.get_scale()) == (1, 512.0)  # type: ignore[union-attr]
    bad_loss = scripted(tmp_path, Scripted({"student": bad("loss", 1)}), name="loss", **changes)
    with pytest.raises(UserError, match=r"loss of student is not finite; .* Try a lower .*, or mixed_precision: bf16"):
        bad_loss.run()
