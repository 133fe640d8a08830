"""Two gloo processes: they are two, share one update, one record, and one end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distill.run import train
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import Scripted, assert_one, halved, metrics, scripted, square, write_images
from tests.distill.two_processes import RESUMED, RUNS, settings
from tests.pipelines import tiny_stable_diffusion


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and what each of two processes found.

    one, two: straight, on so many processes; there: the first half on one, the rest on two; back: the other way round.
    """
    folder = tmp_path_factory.mktemp("two") / "runs"
    write_images(folder / "images", 10)
    for name in RUNS:
        train(settings(folder, "one", name, 1), teacher=denoiser_of(tiny_stable_diffusion()))
    for name in RESUMED:
        halved(folder / "one" / name, folder / "there" / name)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run(
        [sys.executable, *command, "-m", "tests.distill.two_processes", str(folder)],
        cwd=root,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert two.returncode == 0, two.stdout
    for name in RESUMED:
        halved(folder / "two" / name, folder / "back" / name)
        train(settings(folder, "back", name, 1), resume=True, teacher=denoiser_of(tiny_stable_diffusion()))
    return folder, [json.loads(Path(f"{folder}-{rank}.json").read_text()) for rank in range(2)]


def test_there_are_two(runs: tuple[Path, list[dict[str, Any]]]):
    """Some launch commands silently run one."""
    assert [found["world"] for found in runs[1]] == [2, 2]
    assert {found["type"] for found in runs[1]} == {"DistributedType.MULTI_CPU"}


@pytest.mark.parametrize("name", RUNS)
def test_two_with_half_the_batch_are_one(runs: tuple[Path, list[dict[str, Any]]], name: str):
    """Students that are LoRAs and full ones."""
    assert_one(runs[0] / "one" / name, runs[0] / "two" / name)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(("began", "where", "now"), [("one", "there", 2), ("two", "back", 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    runs: tuple[Path, list[dict[str, Any]]], began: str, where: str, now: int, name: str
):
    """With the same rows in each iteration: what was done before is not done again, and the end is that of one."""
    folder, _ = runs
    assert_one(folder / "one" / name, folder / where / name)
    assert json.loads((folder / where / name / "environment.json").read_text())["processes"] == now
    before, after = ((folder / which / name / "metrics.jsonl").read_text().splitlines() for which in (began, where))
    assert before[:2] == after[:2]  # with their seconds
    assert before[2:] != after[2:]


def test_only_the_first_writes(runs: tuple[Path, list[dict[str, Any]]]):
    folder, (first, second) = runs
    assert second["written"] == []
    assert f"open {folder / 'two/pretrain-lora/metrics.jsonl'}" in first["written"]


def test_all_stop_at_a_number_that_one_sees(runs: tuple[Path, list[dict[str, Any]]]):
    """Non-finite on the second process only: no process waits for the other, and both say where."""
    folder, found = runs
    kept = f"the last good checkpoint is {folder / 'bad/checkpoints/step-000002'}"
    line = f"iteration 3: the loss of student is not finite; {kept}. Try a lower learning_rate"
    assert [f["non-finite"] for f in found] == [line, line]


def test_all_stop_after_one_iteration(runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path):
    """A signal to the second process only; resumed, the run ends where it would have."""
    folder, found = runs
    assert [f["signal"] for f in found] == ["stopped at iteration 3 of 6; go on with --resume"] * 2
    assert [f["resumed"] for f in found] == ["done", "done"]
    straight = Scripted({"student": square})
    scripted(tmp_path, straight, train_batch_size=8).run()
    for f in found:
        torch.testing.assert_close(torch.tensor(f["weights"]), straight.weights["student"].detach())
        assert f["memory"] == pytest.approx(straight.memory)
    assert [line["iteration"] for line in metrics(folder / "stopped")] == [1, 2, 3, 4, 5, 6]


def test_all_stop_at_a_collapse_that_one_sees(runs: tuple[Path, list[dict[str, Any]]]):
    """The first process alone draws samples; both stop at what it saw, two pairs of entries 1 apart before."""
    kept = f"the last good checkpoint is {runs[0] / 'fallen/checkpoints/step-000002'}"
    line = f"iteration 4: the student has collapsed: the spread of its samples is 0, of 0.71 before; {kept}"
    assert [f["collapsed"].split(", later")[0] for f in runs[1]] == [line, line]


def test_a_parameter_that_one_process_uses(runs: tuple[Path, list[dict[str, Any]]]):
    """An expert for other levels: means over both processes; none where neither used it, so that AdamW leaves it."""
    assert [f["experts"] for f in runs[1]] == [[[1.5, 3.0], [2.0, 3.0], None]] * 2


def test_nothing_of_a_group_outlives_the_command(runs: tuple[Path, list[dict[str, Any]]]):
    """A thread of gloo's that lets go of a tensor while Python ends aborts the process: a run that was whole has failed."""
    for found in runs[1]:
        assert found["threads within"]
        assert found["threads"] == []
