"""Repositories of the hub without a network: its cache, laid out as huggingface_hub lays it out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest


def keep(cache: Path, name: str, revisions: Mapping[str, Path], patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Put ORG/NAME into the cache that is read from now on, a folder for each branch; the commit of each."""
    root, commits = cache / f"models--{name.replace('/', '--')}", {}
    (root / "refs").mkdir(parents=True)
    for number, (branch, folder) in enumerate(revisions.items(), start=1):
        commits[branch] = f"{number:a>40}"
        shutil.copytree(folder, root / "snapshots" / commits[branch])
        (root / "refs" / branch).write_text(commits[branch])
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return commits


def move(cache: Path, name: str, branch: str, commit: str) -> None:
    """As its owner's push does."""
    (cache / f"models--{name.replace('/', '--')}" / "refs" / branch).write_text(commit)
