"""N iterations straight are k, a kill, and the rest, bit for bit: whatever the method, wherever the kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distill import killed
from tests.distill.killed import EXTRA
from tests.distill.runs import metrics, write_images
from tests.processes import begun, ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of every combination; two processes share them, one for each core."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images", 10)
    names, log = sorted(EXTRA), folder / "log.txt"
    ended([begun(killed.main, folder, names[half::2], log=log) for half in range(2)], log)
    return folder


every_run = pytest.mark.parametrize("name", sorted(EXTRA))


@every_run
def test_the_runs_really_died(runs: Path, name: str):
    """One straight through; killed inside an accumulation, during a save and in mid-iteration; one to the end."""
    log = (runs / name / "killed/log.txt").read_text()
    assert json.loads((runs / name / "codes.json").read_text()) == [0, -9, -9, -9, 0], log


@every_run
def test_what_was_resumed_from(runs: Path, name: str):
    """The newest whole checkpoint, with a line for what was passed over: half a save, and a torn one."""
    checkpoints = runs / name / "killed/run/checkpoints"
    log = (runs / name / "killed/log.txt").read_text()
    said = [
        f"resumed from {checkpoints}/step-000002 at iteration 2",  # killed in the fourth iteration
        f"checkpoint {checkpoints}/.step-000004.partial: the run ended while it was written",
        f"resumed from {checkpoints}/step-000002 at iteration 2",
        f"checkpoint {checkpoints}/step-000006: student.safetensors is damaged; passed over",
        f"resumed from {checkpoints}/step-000004 at iteration 4",
    ]
    lines = [line for line in log.splitlines() if line.startswith(("resumed", "checkpoint"))]
    assert lines == said


@every_run
def test_the_last_checkpoint_is_the_same_to_the_bit(runs: Path, name: str):
    """Weights of every role, optimisers, moving averages, the method's state: the hash of each file."""
    straight, killed = ((runs / name / which / "run/checkpoints") for which in ("straight", "killed"))
    manifests = [json.loads((folder / "step-000008/manifest.json").read_text()) for folder in (straight, killed)]
    assert manifests[0] == manifests[1]
    roles = {"student", "fake_score"} if name.startswith(("disback", "dmd", "phased_dmd")) else {"student"}
    target = {"target"} if name.startswith("disback") or name == "lcm-full" else set()
    files = roles | target | {f"optimizer-{role}" for role in roles} | {"average"}
    assert manifests[0].keys() == {"meta.json"} | {f"{file}.safetensors" for file in files}
    assert sorted(p.name for p in straight.iterdir()) == sorted(p.name for p in killed.iterdir())


def content(folder: Path) -> dict[str, Any]:
    """An artifact's weights, without the random order of their headers, and what says how to sample with them."""
    found: dict[str, Any] = {}
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            found[str(file.relative_to(folder))] = {k: v.numpy().tobytes() for k, v in load_file(file).items()}
        elif file.name in ("fewstep.json", "scheduler_config.json"):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


@every_run
def test_logs_and_student_are_the_same(runs: Path, name: str):
    straight, killed = (runs / name / which / "run" for which in ("straight", "killed"))
    lines = metrics(straight)
    assert metrics(killed) == lines
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    assert len({line["samples/spread"] for line in lines}) > 1
    assert len({line["student/loss"] for line in lines[1:] if "student/loss" in line}) > 1
    artifacts = [content(run / "student") for run in (straight, killed)]
    assert artifacts[0] == artifacts[1]
    assert {"fewstep.json", "scheduler/scheduler_config.json"} < artifacts[0].keys()
