"""A report as text: digits, and the width of a terminal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fewstep.distill.table import cell, heading, labels, show


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.95312, 0.01234, "0.953 ± 0.012"),
        (123.456, 4.56, "123.5 ± 4.6"),
        (123.456, 45.6, "123 ± 46"),
        (1.0, 0.0, "1.000"),
        (1.0, None, "1.000"),
        (None, None, "-"),
    ],
)
def test_a_cell_has_two_digits_of_its_error(value: float | None, error: float | None, text: str):
    assert cell(value, error) == text


def row(role: str, source: str, steps: int) -> dict[str, Any]:
    metrics = {"background_accuracy": {"value": 0.9, "stderr": 0.02}, "diversity": {"value": 2.5, "stderr": None}}
    seconds = None if role == "reference" else 0.123
    return {
        "role": role,
        "source": source,
        "steps": steps,
        "nfe": steps,
        "seconds_per_image": seconds,
        "metrics": metrics,
    }


ROWS = [row("reference", "real renderings", 0), row("teacher", "a/b", 4), row("student", "c/one", 1)]


def test_sources_are_named_where_a_role_has_several():
    assert labels(ROWS) == ["real", "teacher, 4 steps", "student, 1 step"]
    assert labels([*ROWS, row("student", "c/two", 1)])[2:] == ["one, student, 1 step", "two, student, 1 step"]
    two = [row("student", f"runs/{name}/student", 1) for name in ("a", "b")]
    assert labels(two) == ["a/student, student, 1 step", "b/student, student, 1 step"]
    folders = [row("folder", source, 0) | {"n": 6} for source in ("x/same", "y/same", "same")]
    assert labels(folders) == ["x/same, 6 images", "y/same, 6 images", "same, 6 images"]


def test_a_heading_tells_prompts_and_seeds_where_something_was_drawn_with_them():
    block: dict[str, Any] = {"n": 2, "seeds": [3, 4], "prompts": "p.txt", "rows": ROWS}
    assert heading(block) == "2 images a row, prompts p.txt, seeds 3 to 4"
    folder = row("folder", "a/b", 0) | {"n": 6}
    assert heading(block | {"rows": [*ROWS, folder]}) == "2 images of each sampled row, prompts p.txt, seeds 3 to 4"
    assert heading({"rows": [folder], "reference": "c"}) == "folders of images, reference c"


@pytest.mark.parametrize(("width", "shown"), [(50, "0.900"), (90, "0.900 ± 0.020")])
def test_a_terminal_gets_a_table_that_fits(
    width: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Names and values are whole at any width; errors only where there is room."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")  # of a dumb one rich takes 80 columns
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    show({"n": 2, "seeds": [1, 2], "prompts": "embedded:emoji", "rows": ROWS, "blocks": []})
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    (line,) = [line for line in lines if line.startswith("background_accuracy")]
    assert line.count(shown) == 3
    assert ("±" in line) == ("±" in shown)
