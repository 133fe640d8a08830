"""What every test may rely on: no network, no telemetry, diffusers importable, and fresh interpreters on request."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# before anything imports huggingface_hub or gradio; child processes inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# before anything imports torch: one thread a worker, and a forked process waits for ever for threads that it has not
os.environ["OMP_NUM_THREADS"] = "1"

# torch, diffusers and transformers are a million objects, which are not looked through again for every 700 new ones
gc.set_threshold(20_000)

# Files that read what one fixture of the session makes, a training or thirty saved students: on one worker it is made once.
TOGETHER = [
    [
        f"tests/app/test_{name}.py"
        for name in ("main", "commands", "playground", "report", "foreign", "push", "cite", "revisions")
    ],
    [f"tests/samplers/test_{name}.py" for name in ("card", "student")],
]
# Begun before the others, which then fill the end of both workers.
LONG = [
    *("distill/test_sharding", "distill/test_resume", "samplers/test_card", "app/test_main", "app/test_evaluate"),
    *("distill/test_recipes", "distill/test_backbones", "distill/test_mixture", "distill/test_processes"),
    *("distill/test_msd", "test_package"),
    *("distill/test_stability", "samplers/test_jvp", "distill/test_disback", "samplers/test_denoisers"),
]


def pytest_collectstart() -> None:
    """Before any test imports diffusers: see fewstep.samplers.compat. Workers collect; who hands out tests needs no torch."""
    import fewstep.samplers  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, and behind each those that go with it."""
    order = [file for name in LONG for file in unit(f"tests/{name}.py")]
    rank = {file: i for i, file in reversed(list(enumerate(order)))}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(order)))


def unit(file: str) -> list[str]:
    """The files that are tested on one worker with this one."""
    return next((files for files in TOGETHER if file in files), [file])


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with some files as one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(super()._split_scope(nodeid))[0]

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def fresh_python(tmp_path: Path) -> Callable[..., str]:
    """Run code in a fresh interpreter, in an empty folder; what it printed. Keywords are environment variables."""

    def run(code: str, **env: str) -> str:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
