"""Students that several test files read."""

from __future__ import annotations

import pytest

from tests.samplers.students import CASES, Saved, saved


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every case by name; copy a folder before you change it."""
    folder = tmp_path_factory.mktemp("students")
    return {name: saved(folder / name, name) for name in CASES}
