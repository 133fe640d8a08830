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
from safetensors.torch import load_file

from fewstep.distill.run import train
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import Scripted, metrics, scripted, square, write_images
from tests.distill.two_processes import RUNS, settings
from tests.pipelines import tiny_stable_diffusion


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, two processes' and one's, and what each of the two found."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    write_images(folder / "images", 10)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.Popen(
        [sys.executable, *command, "-m", "tests.distill.two_processes", str(folder)],
        cwd=root,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for method in RUNS:
        train(settings(folder, method, 1), teacher=denoiser_of(tiny_stable_diffusion()))
    said, _ = two.communicate()
    assert two.returncode == 0, said
    return folder, [json.loads(Path(f"{folder}-{rank}.json").read_text()) for rank in range(2)]


def test_there_are_two(runs: tuple[Path, list[dict[str, Any]]]):
    """Some launch commands silently run one."""
    assert [found["world"] for found in runs[1]] == [2, 2]
    assert {found["type"] for found in runs[1]} == {"DistributedType.MULTI_CPU"}


@pytest.mark.parametrize("method", RUNS)
def test_two_with_half_the_batch_are_one(runs: tuple[Path, list[dict[str, Any]]], method: str):
    """Each sample has its draws whoever holds it, so that only the order of float32 sums differs: 1e-7 of a gradient,
    some 1e-5 of an update of 0.01 in each of four steps.
    """
    folder, _ = runs
    one, two = (load_file(folder / f"{method}-{n}/checkpoints/step-000004/student.safetensors") for n in (1, 2))
    start = load_file(folder / f"{method}-1/checkpoints/step-000002/student.safetensors")
    assert one.keys() == two.keys()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    assert moved > 1e-3
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-3 * moved
    for a, b in zip(*(metrics(folder / f"{method}-{n}") for n in (1, 2)), strict=True):
        means = a.keys() - {"student/spread"}  # that one is of the rows of a micro-batch together
        assert {k: a[k] for k in means} == pytest.approx({k: b[k] for k in means}, rel=1e-3, abs=1e-6)


def test_only_the_first_writes(runs: tuple[Path, list[dict[str, Any]]]):
    folder, (first, second) = runs
    assert second["written"] == []
    assert f"open {folder / 'pretrain-2/metrics.jsonl'}" in first["written"]


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
