"""BibTeX of a run: the papers of its method, from its record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.app.cite import BEHIND, PAPERS, bibtex, cite, papers
from fewstep.distill.config import METHODS
from tests.app.conftest import Answer


@pytest.mark.parametrize(
    ("method", "student", "numbers"),
    [
        ("dmd", "full", ["2311.18828"]),
        ("dmd2", "lora", ["2311.18828", "2405.14867"]),
        ("lcm", "full", ["2303.01469", "2310.04378"]),
        ("lcm", "lora", ["2303.01469", "2310.04378", "2311.05556"]),
        ("pretrain", "full", []),
        ("tsm", "full", ["2410.23274"]),
        ("sid", "full", ["2404.04057", "2406.01561"]),
    ],
)
def test_papers_of_a_run_and_of_its_student(tmp_path: Path, method: str, student: str, numbers: list[str]):
    (tmp_path / "config.yaml").write_text(f"method: {method}\nstudent: {student}\n")
    assert re.findall(r"eprint += \{(.*)\}", cite(str(tmp_path))) == numbers
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "fewstep.json").write_text(json.dumps({"method": method, "kind": student}))
    assert re.findall(r"eprint += \{(.*)\}", cite(str(tmp_path))) == numbers


@pytest.mark.parametrize(
    ("added", "keys"),
    [
        ({"regression_weight": 4.0, "policy": "trajectory"}, ["tdm", "progressive"]),
        ({"regression_weight": 0.25, "policy": "backward_simulation"}, ["tdm", "dmd"]),
        ({"gan_weight": 0.01, "discriminator": "heads"}, ["tdm", "dmd2"]),
        ({"gan_weight": 0.01, "discriminator": "mean"}, ["tdm"]),
        ({"gan_weight": 0.01, "discriminator": "heads", "discriminator_features": "teacher"}, ["tdm", "dmd2", "ladd"]),
        ({"student_init": "runs/tsm", "regression_weight": 0.0, "gan_weight": 0.0}, ["tdm", "msd"]),
        ({"student_config": {"layers_per_block": 1}}, ["tdm", "msd"]),
    ],
    ids=str,
)
def test_what_a_config_adds_is_cited(tmp_path: Path, added: dict, keys: list[str]):
    (tmp_path / "config.yaml").write_text(json.dumps({"method": "tdm", "student": "full"} | added))
    assert re.findall(r"eprint += \{(.*)\}", cite(str(tmp_path))) == [PAPERS[key][0] for key in keys]


def test_every_method_is_known():
    assert BEHIND.keys() == METHODS.keys()
    assert {key for m in METHODS for key in papers(m, "lora", 2)} | {"progressive", "ladd"} == PAPERS.keys()
    assert papers("dmd2", "full", 2) == ("msd", *papers("dmd2", "full", 1))


def test_an_entry_is_whole():
    """The keys of two entries differ, and braces are closed."""
    entries = [bibtex(key) for key in PAPERS]
    assert len({entry.splitlines()[0] for entry in entries}) == len(PAPERS)
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    assert "author        = {Yang Song and Prafulla Dhariwal and Mark Chen and Ilya Sutskever}," in bibtex("cm")


def test_from_the_command_line(fewstep: Callable[..., Answer], trained: Path, tmp_path: Path):
    answer = fewstep("cite", trained)
    assert (answer.code, answer.out) == (0, f"{bibtex('dmd')}\n\n{bibtex('dmd2')}\n")
    nothing = fewstep("cite", tmp_path)
    assert (nothing.code, nothing.out) == (2, "")
    assert (
        nothing.err
        == f"{tmp_path}: neither a run nor a student's folder; a run has config.yaml, a student fewstep.json\n"
    )
