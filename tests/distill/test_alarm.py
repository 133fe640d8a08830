"""A student that collapses ends its run: each way is made to happen, and neither alarm speaks on a run that is well."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.distill import alarm as alarms
from fewstep.distill import checkpoint, run
from fewstep.distill.alarm import (
    BUDGET,
    LOOKS,
    PATIENCE,
    SHARE,
    TIMES,
    WINDOW,
    CollapseAlarm,
    SampleAlarm,
    sample_alarm,
)
from fewstep.distill.run import train
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.closed_form import vp
from tests.distill.gaussian import Teacher, calls, method, under_training
from tests.distill.runs import config, metrics
from tests.pipelines import tiny_wan

# what methods log


def gaussian(folder: Path, stuck: bool, **changes: Any) -> Any:
    """DMD2 towards N(m, .9^2); `stuck`: the fake score is wider than the student's samples and never learns."""
    teacher = Teacher(vp(), [0.3, -0.2], [0.9, 0.9])
    rate = {"learning_rate": 0.03 if stuck else 0.005, "fake_score_learning_rate": 1e-12 if stuck else 0.02}
    settings = {"method": "dmd2", "steps": [1], "guidance_scale": 1.0, "fake_score_updates": 1, "train_batch_size": 8}
    made = method(folder, teacher, **settings, **rate, prompts="in memory", train_data=None, **changes)
    made.student.denoiser.network.jump = True  # starts with the right spread
    if stuck:
        made.fake_score.denoiser.network.log_std.data += 0.5
    trainer = under_training(folder, made, teacher, ["0"] * 8)
    trainer.alarm.reference = 0.9  # the teacher's own
    return trainer


@pytest.mark.parametrize(("every", "limit"), [(10, 3), (1, 1)])
def test_a_student_that_collapses_is_stopped(tmp_path: Path, every: int, limit: int):
    """A fake score that does not follow drives every sample to the teacher's mode; what was written before is kept."""
    trainer = gaussian(tmp_path, True, max_train_steps=200, checkpointing_steps=every, checkpoints_total_limit=limit)
    with pytest.raises(UserError) as caught:
        trainer.run()
    (good,) = trainer.alarm.keep(tmp_path / "run/checkpoints")
    assert good is not None
    assert f"the last good checkpoint is {good}" in str(caught.value)
    spreads = {line["iteration"]: line["student/spread"] for line in metrics(tmp_path / "run")}
    at = int(good.name.removeprefix("step-"))
    assert spreads[at] > SHARE * 0.9  # of the student in that checkpoint
    assert max(spreads[i] for i in list(spreads)[-PATIENCE:]) < SHARE * 0.9
    assert len(checkpoint.iterations(tmp_path / "run/checkpoints")) == limit + 1  # it and the last ones


@pytest.mark.parametrize("every", [1, 7, 30])
def test_the_checkpoint_that_is_kept_is_never_long_past(tmp_path: Path, every: int):
    """One of those written within two windows, and known to be good; of a run that is well three folders at most."""
    alarm = CollapseAlarm(1.0)
    for i in range(1, 301):
        alarm.look(i, {"student/spread": 1.0}, tmp_path)
        if i % every == 0:
            (newest := tmp_path / f"step-{i:06d}").mkdir()
            checkpoint.prune(tmp_path, newest, 1, *alarm.keep(tmp_path))
            left = [int(p.name.removeprefix("step-")) for p in checkpoint.iterations(tmp_path)]
            assert len(left) <= 3
            if i > 3 * max(WINDOW, every):
                assert alarm.good - left[0] <= max(WINDOW, every)
                assert left[0] <= alarm.good


def test_a_student_that_learns_is_let_alone(tmp_path: Path):
    """The same job with a fake score that follows; about as many iterations as the other lived."""
    trainer = gaussian(tmp_path, False, max_train_steps=100, checkpointing_steps=100)
    trainer.run()
    assert trainer.alarm.low == 0


def fed(alarm: CollapseAlarm, spreads: list[float], gap: float, start: int = 0) -> int | None:
    """The iteration at which the alarm stops a run that logs these spreads."""
    for i, value in enumerate(spreads, start + 1):
        try:
            alarm.look(i, {"student/spread": value, "student/gap": gap}, Path("none"))
        except UserError:
            return i
    return None


FELL = [1.0] * 50 + [0.0] * 100


def test_when_the_alarm_speaks():
    """After a fall to 0 the mean of 20 is under a quarter once 16 are low (4 of 20 are a fifth), for 20 updates then."""
    assert fed(CollapseAlarm(1.0), FELL, 0.5) == 50 + 16 + PATIENCE - 1
    # half the window still good, the oldest of it is of iteration 41
    alarm = CollapseAlarm(1.0)
    fed(alarm, FELL[:70], 0.5)
    assert alarm.good == 41
    assert fed(CollapseAlarm(1.0), [1.0] * 50 + [0.0] * 30 + [1.0] * 50, 0.5) is None  # 19 low ones, then it recovered


@pytest.mark.parametrize(
    ("spreads", "reference", "gap"),
    [
        (FELL, None, 0.5),  # nothing to compare with
        ([0.0] * 200, 0.5, 0.5),  # batches of one row
        ([0.02 * i for i in range(1, 50)], 0.5, 0.5),  # starts narrow, as one-step samples of a teacher are
        ([14.0] * 50 + [0.7] * 200, 0.8, 0.5),  # starts wide: an epsilon teacher asked at pure noise
        ([0.5] * 50 + [0.05] * 200, 0.5, 0.01),  # narrow and right: the scores agree
    ],
    ids=["no reference", "one row", "narrow start", "wide start", "scores agree"],
)
def test_when_the_alarm_does_not_speak(spreads: list[float], reference: float | None, gap: float):
    assert fed(CollapseAlarm(reference), spreads, gap) is None


def test_a_method_that_logs_no_spread_is_let_alone():
    alarm = CollapseAlarm(1.0)
    for i in range(200):
        alarm.look(i, {"student/loss": 0.0}, Path("none"))
    assert alarm.window == []


def test_the_alarm_resumes_where_it_was():
    whole, first, second = (CollapseAlarm(1.0) for _ in range(3))
    assert fed(first, FELL[:60], 0.5) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert fed(second, FELL[60:], 0.5, start=60) == fed(whole, FELL, 0.5)


# samples of any method

METHODS: dict[str, dict[str, Any]] = {
    "lcm": {"guidance_scale": 2.0, "steps": [1, 2, 4]},
    "pretrain": {"step_counts": [4], "validation_guidance_scale": 1.5},
    "tsm": {"step_counts": [20], "validation_guidance_scale": 2.0},
    "dmd2": {"guidance_scale": 2.0, "steps": [2], "fake_score_updates": 2, "fake_score_learning_rate": 1e-2},
}
every_method = pytest.mark.parametrize("name", METHODS)


def watched(folder: Path, job: str, iterations: int, **changes: Any) -> Any:
    """A run towards N(m, s^2) with the alarm that `train` would give it."""
    teacher = Teacher(vp("v_prediction", zero_terminal_snr=True), [0.3, -0.2], [0.9, 0.5])
    data = teacher.mean + teacher.std * torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"method": job, "learning_rate": 1e-3, "checkpointing_steps": 10, **METHODS[job]}
    if job == "dmd2":
        settings |= {"prompts": "in memory", "train_data": None}
    made = method(folder, teacher, **(settings | {"max_train_steps": iterations} | changes))
    trainer = under_training(folder, made, teacher, ["0"] * 8, data)
    trainer.samples = sample_alarm(made.config, made, trainer.batches, trainer.record)
    return trainer


@every_method
def test_looks_are_under_a_hundredth_of_a_run(tmp_path: Path, name: str):
    """Of the shortest that is watched: rows through networks, of which those with a backward count three. None speaks."""
    settings = {"train_batch_size": 8, "checkpointing_steps": 1000}
    every = watched(tmp_path, name, 10**6, **settings).samples.every
    assert watched(tmp_path, name, LOOKS * every, **settings).samples is None  # would end before it could be stopped
    trainer = watched(tmp_path, name, LOOKS * every + 1, **settings)
    looked: list[int] = []
    with calls(trainer.method) as seen:

        def counted(draw: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                before = len(seen)
                latents = draw()
                looked.extend(range(before, len(seen)))
                return latents

            return run

        trainer.samples.draw, trainer.samples.compare = map(counted, (trainer.samples.draw, trainer.samples.compare))
        trainer.run()
    cost = [call.rows * (3 if call.graph else 1) for call in seen]
    assert 0.001 < sum(cost[i] for i in looked) / sum(cost) < BUDGET
    assert trainer.samples.seen["bad"] == 0
    assert trainer.samples.seen["good"] == LOOKS * every


@every_method
def test_a_student_whose_samples_become_one_is_stopped(tmp_path: Path, name: str):
    """Whatever the method, on batches of one row: from iteration 25 on the posterior mean shrinks to the mean alone."""
    trainer = watched(tmp_path, name, 10**6, train_batch_size=1, checkpointing_steps=2, checkpoints_total_limit=1)
    trainer.samples.every = 10  # so that several are written, and pruned, between two looks
    network, step = trainer.roles["student"].denoiser.network, trainer.step

    def shrinking(i: int) -> dict[str, float]:
        said = step(i)
        if i >= 25:
            network.log_std.data -= 1
            for corrections in (network.scale, network.offset, network.tilt):
                corrections.data.zero_()
        return said

    trainer.step = shrinking
    with pytest.raises(UserError) as caught:
        trainer.run()
    kept = f"the last good checkpoint is {tmp_path / 'run/checkpoints/step-000020'}"
    assert re.match(
        rf"iteration 40: the student has collapsed: the spread of its samples is \S+, of \S+ before; {kept}",
        str(caught.value),
    )
    spreads = {line["iteration"]: line["samples/spread"] for line in metrics(tmp_path / "run")}
    assert spreads[31] < SHARE * min(spreads[21], trainer.samples.seen["reference"])
    assert spreads[1] == pytest.approx(spreads[21], rel=0.2)


def test_a_rate_that_kills_a_student_stops_it(tmp_path: Path):
    """LCM on batches of one row: its samples come apart, far wider than the teacher's, though every loss is finite."""
    trainer = watched(tmp_path, "lcm", 1000, train_batch_size=1, learning_rate=3.0)
    trainer.samples.every = 10
    with pytest.raises(UserError, match=r"the student has collapsed: .* Try a lower learning_rate; collapse_alarm"):
        trainer.run()
    assert metrics(tmp_path / "run")[-1]["samples/spread"] > TIMES * trainer.samples.seen["reference"]


def test_looking_changes_no_bit(tmp_path: Path):
    """Of the weights, and of what is logged beside."""
    seen = []
    for every in (1, None):
        trainer = watched(tmp_path, "dmd2", 5, name=str(every))
        assert trainer.samples is None
        if every is not None:
            trainer.samples = watched(tmp_path, "dmd2", 10**6, name="other").samples
            trainer.samples.every = every
        trainer.run()
        lines = [{k: v for k, v in line.items() if k != "samples/spread"} for line in metrics(tmp_path / str(every))]
        seen.append((lines, {k: p.tolist() for k, p in trainer.roles["student"].parameters.items()}))
    assert seen[0] == seen[1]


def test_clips_on_batches_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Through `train`: looked at before every iteration; from the fourth on the student makes the same of any noise."""
    monkeypatch.setattr(alarms, "BUDGET", 1e3)
    trained = run.Trainer.step

    def step(self: Any, i: int) -> dict[str, float]:
        said = trained(self, i)
        if i == 3:
            self.roles["student"].denoiser.guided_x0 = lambda x, *rest: torch.zeros_like(x)
        return said

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    size = {"height": 64, "width": 64, "num_frames": 5, "rank": 2}
    settings = {"method": "dmd2", "train_data": None, "prompts": str(tmp_path / "prompts.txt"), "steps": [2], **size}
    settings |= {"train_batch_size": 1, "checkpointing_steps": 2, "max_train_steps": 8, "preflight": False}
    monkeypatch.setattr(run.Trainer, "step", step)
    with pytest.raises(UserError, match=r"^iteration 5: the student has collapsed: the spread .* is 0, .*step-000002,"):
        train(config(tmp_path, **settings), teacher=denoiser_of(tiny_wan()))
    assert min(line["samples/spread"] for line in metrics(tmp_path / "run")[:4]) > 0.1


def shown(spreads: list[float], reference: float, state: dict[str, Any] | None = None, start: int = 0) -> Any:
    """The look, from 0, at which the alarm stops a run of these spreads, None where it does not; and its state."""
    values = iter(spreads)
    pair = torch.tensor([-1.0, 1.0])[:, None] / 2**0.5  # of spread 1
    record: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), checkpoints=Path("none"))
    alarm = SampleAlarm(lambda: pair * next(values), lambda: pair * reference, 1, record)
    alarm.seen |= state or {}
    for i in range(len(spreads)):
        try:
            alarm.look(start + i)
        except UserError:
            return start + i, alarm.seen
    return None, alarm.seen


@pytest.mark.parametrize(
    ("spreads", "reference", "stops"),
    [
        ([1.0, 0.9, 0.2, 0.2, 0.2], 1.0, 3),  # the second look in a row
        ([1.0, 0.2, 1.0, 0.2, 1.0], 1.0, None),  # it recovers
        ([1.0, 9.0, 9.0], 1.0, 2),
        ([0.05, 0.05, 0.06, 0.2, 0.8], 1.0, None),  # starts narrow
        ([0.1, 0.4, 0.05, 0.05], 1.0, 3),  # and falls again
        ([14.0, 12.0, 3.0, 0.8, 0.7], 0.8, None),  # starts wide: an epsilon teacher asked at pure noise
        ([14.0, 12.0, 0.8, 9.0, 9.0], 0.8, 4),  # and comes apart again
        ([1.0, float("nan"), float("nan")], 1.0, 2),
        ([1.0, 0.0, 0.0], 0.0, None),  # a data set of one picture
    ],
)
def test_when_a_look_at_samples_speaks(spreads: list[float], reference: float, stops: int | None):
    assert shown(spreads, reference)[0] == stops


def test_a_spread_is_sent_from_the_device(monkeypatch: pytest.MonkeyPatch):
    """A data set's latents are on the CPU, and NCCL takes none from there."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(alarms, "mean", lambda accelerator, value: sent.append(value) or torch.ones(()))
    record: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("meta"), is_main_process=True, num_processes=1)
    )
    SampleAlarm(lambda: torch.randn(4, 3), lambda: torch.randn(4, 3), 1, record).look(0)
    assert [value.device.type for value in sent] == ["meta", "meta"]


def test_the_alarm_of_samples_resumes_where_it_was():
    spreads = [1.0, 0.9, 0.2, 0.2]
    _, state = shown(spreads[:3], 1.0)
    assert shown(spreads[3:], 5.0, json.loads(json.dumps(state)), start=3)[0] == shown(spreads, 1.0)[0] == 3


def test_a_method_without_a_teacher_is_held_to_its_data(tmp_path: Path):
    """Under as many prompts as rows, since one of them may have one picture; with a teacher all seeds share a prompt."""
    trainer = watched(tmp_path, "pretrain", 10**6)
    assert trainer.samples.compare().equal(trainer.batches.latents)
    told = []
    for name in ("pretrain", "lcm"):
        trainer = watched(tmp_path, name, 10**6, name=name)
        trainer.batches.condition.tensors["shift"].copy_(torch.arange(8.0))
        denoiser = trainer.roles["student"].denoiser
        guided = denoiser.guided_x0
        denoiser.guided_x0 = lambda x, t, c, *rest, _g=guided: (
            told.append(c.tensors["shift"].tolist()) or _g(x, t, c, *rest)
        )
        trainer.samples.draw()
    assert told == [[0.0, 1.0, 2.0, 3.0]] * 4 + [[0.0] * 4] * 4


def test_a_model_of_many_steps_is_looked_at_in_few(tmp_path: Path):
    """Twenty are thinned to the teacher's four, at the guidance of its own plan: before training the samples are the same."""
    trainer = watched(tmp_path, "tsm", 10**6)
    with calls(trainer.method) as seen:
        torch.testing.assert_close(trainer.samples.draw(), trainer.samples.compare())
    assert [call.role for call in seen] == ["student"] * 4 + ["teacher"] * 4
