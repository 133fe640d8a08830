"""environment.json of a run's folder: where it was trained, and what a resumed run may not find changed."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fewstep.distill import checkpoint

FILE = "environment.json"
KEPT = ("data", "teacher", "moved")
"""What a resumed run takes over: hash and number of what it learns from, the teacher's fingerprint, whether its weights moved."""


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    packages = {}
    for name in ("fewstep", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}
    return {"python": platform.python_version(), "packages": packages, **machine}


def noted(folder: Path) -> dict[str, Any]:
    """What the file says; nothing where it is lost."""
    try:
        return dict(json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def note(folder: Path, found: dict[str, Any]) -> None:
    """Write the file; UserError where it cannot be."""
    with checkpoint.writing(folder, "set output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(folder / FILE, json.dumps(found, indent=2))
