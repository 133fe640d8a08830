"""One teacher and one run for all tests of the command line, and the command line itself, in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.app.evaluating import Setting
from tests.pipelines import tiny_stable_diffusion


class Answer(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Answer:
    """`fewstep ARGUMENTS` in this process: a fresh one would import diffusers again."""
    from fewstep.app.main import main

    before, sys.argv = sys.argv, ["fewstep", *map(str, arguments)]
    out, err = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    return Answer(int(end.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def fewstep() -> Callable[..., Answer]:
    return run


@pytest.fixture(autouse=True)
def no_accelerate_state() -> Iterator[None]:
    """A precision set by one run would be refused in the next."""
    yield
    reset()


def reset() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder."""
    folder = tmp_path_factory.mktemp("pipelines") / "teacher"
    tiny_stable_diffusion(folder)
    return folder


@pytest.fixture(scope="session")
def setting(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """What evaluations of that pipeline need."""
    return Setting(tmp_path_factory.mktemp("evaluate"), teacher)


@pytest.fixture(scope="session")
def config(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations and a report over two sets of prompts, at the size that the embedded figures take."""
    folder = tmp_path_factory.mktemp("configs")
    values = {
        **{"method": "dmd2", "teacher": str(teacher), "prompts": "embedded:emoji", "num_samples": 20},
        **{"steps": [2, 4], "rank": 2, "max_train_steps": 2, "train_batch_size": 4, "height": 64, "width": 64},
        **{"output_dir": str(folder / "runs"), "cache_dir": str(folder / "cache"), "guidance_scale": 3.0},
        **{
            "report_num": 8,
            "report_teacher_steps": [8, 1],
            "report_prompts": ["embedded:emoji", "embedded:emoji/full"],
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def trained(config: Path) -> Path:
    """The run's folder; what the command printed stands in `printed.txt` beside it."""
    answer = run("train", config)
    assert answer.code == 0, answer.err
    (config.parent / "printed.txt").write_text(answer.out)
    reset()
    return config.parent / "runs" / "tiny"


@pytest.fixture
def broken(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may break."""
    return Path(shutil.copytree(teacher, tmp_path / "broken"))
