"""Processes that cannot import this project: a user's own, with plain diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMPAT = Path(__file__).parent.parent / "samplers" / "compat.py"


def run(code: str, folder: Path, *arguments: str) -> str:
    """Run code in a folder; what it printed.

    A torchvision without its operators keeps diffusers from being imported; fewstep declares them when it is imported, a
    process without fewstep must do so by itself.
    """
    site = folder / "site"
    site.mkdir()
    without = "declare_torchvision_operators()\nimport sys\nsys.modules['fewstep'] = None\n"
    (site / "sitecustomize.py").write_text(f"{COMPAT.read_text()}\n{without}")
    command, env = [sys.executable, "-c", code, *arguments], os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
