"""The tables of methods and backbones say what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.app.tables import backbones, default, matrix, methods, outlined
from fewstep.distill.config import METHODS
from fewstep.distill.console import WIDTH, blocks, columns
from fewstep.samplers.load import FAMILIES
from tests.app.conftest import Answer

COST, ALONE, NETWORKS = "forwards / backwards", "without the student", "networks: full / LoRA"


def test_methods(fewstep: Callable[..., Answer]):
    """LCM: the teacher twice (guidance), the target, the student; ordinary training: one call."""
    head, *rows = methods()
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table.keys() == METHODS.keys()
    assert (table["lcm"][COST], table["lcm"][ALONE]) == ("4 / 1", "-")
    assert table["pretrain"][COST] == "1 / 1"
    assert (table["tsm"]["needs"], table["tsm"][COST]) == ("images, student_config", "2 / 1")
    assert (table["dmd2"]["needs"], table["dmd2"]["trains"]) == ("prompts", "student, fake_score")
    # SiD guided three times: teacher 2, fake score 2 and once more, 2 to train it, the student 1; half a step of rollout
    assert (table["sid"][COST], table["sid"][ALONE]) == ("9 / 7", "3 / 2")
    # two phases of two steps: 0.5 or 2.5 calls of rollout; the student 1, teacher 2, fake score 1 and once more to train it
    assert (table["phased_dmd"][COST], table["phased_dmd"][ALONE]) == ("6.5 / 2", "3.5 / 1")
    assert "2405.14867" in table["dmd2"]["papers (arXiv)"]
    found = fewstep("methods").out
    assert all(name in found for name in METHODS)
    assert max(map(len, found.splitlines())) <= WIDTH
    assert "steps: 1 to 4, lcm 1 to 8, phased_dmd 2 to 4, pretrain 1 to 1000, tsm 1 to 1000\n" in found
    several = " ".join(found[found.index("parts=P: P students") :].split())
    assert "in the memory of one" in several
    assert several.partition("; of ")[2] == "disback, dmd, dmd2, sid, sid_fewstep, sim, swiftbrush, tdm, uni_instruct"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_page_of_a_method_says_what_it_costs(name: str, root: Path):
    """The first line under Cost, at the defaults; that the methods make these calls is counted in tests/distill."""
    page = (root / "docs/methods" / f"{name}.md").read_text()
    pair = r"([\d.]+) / ([\d.]+)"
    line = rf"^## Cost\n\nAt the defaults {pair} forwards / backwards a row(?:, without the student {pair})?\.$"
    found = re.findall(line, page, re.MULTILINE)
    assert len(found) == 1, line
    said = [float(v) for v in found[0] if v]
    costs = outlined(default(name)).forwards().values()
    assert said == [v for c in costs for v in (c["forward"] + c["backward"], c["backward"])]


def test_families_and_networks_are_those_of_the_roles():
    """Full: a network for each role; LoRA: one base, which is the teacher, and a LoRA for each of the others.

    Teacher, student and fake score; of lcm the student's average with full weights, which a LoRA takes no network for;
    of disback the target that walks back, too; a network of another size is no LoRA.
    """
    head, *rows = methods()
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    matching = {name for name, row in table.items() if row["family"] == "distribution matching"}
    assert matching == set(METHODS) - {"lcm", "pretrain", "tsm"}
    assert table["lcm"]["family"] == "consistency"
    networks = {name: row[NETWORKS] for name, row in table.items()}
    assert {networks.pop(name) for name in matching - {"disback"}} == {"3 / 1 + 2"}
    assert networks == {"lcm": "3 / 1 + 1", "disback": "4 / 1 + 3", "pretrain": "1 / 1 + 1", "tsm": "2 / -"}


def test_backbones(fewstep: Callable[..., Answer]):
    """What each method makes of each, and why not where it does not. tests/distill/test_backbones.py trains them."""
    head, *rows = backbones()
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table.keys() == FAMILIES.keys()
    assert table["WanPipeline"]["networks"] == "transformer, transformer_2"
    (_, *names), *cells = (line for line in matrix()[0])
    notes = matrix()[1]
    assert names == sorted(METHODS)
    assert [row[0].removesuffix(" *") + "Pipeline" for row in cells] == sorted(FAMILIES)
    starred = {row[0].removesuffix(" *") for row in cells if row[0].endswith(" *")}
    assert starred == {"ConsistencyModel", "DDPM", "DiT", "PixArtAlpha", "PixArtSigma"}

    def number(part: str) -> int:
        (found,) = (i for i, note in enumerate(notes, 1) if part in note)
        return found

    table = {row[0]: dict(zip(names, row[1:], strict=True)) for row in cells}
    small = f"full {number('no LoRA')}"
    both = f"LoRA full {number('phases of a')}"  # each of Wan 2.2's networks a phase; 2.1 has one
    assert table.pop("Wan") == dict.fromkeys(names, "LoRA full") | {"tsm": small, "phased_dmd": both}
    for name, row in table.items():
        phases = f"- {number('needs a network for each phase')}" if "*" in name else f"LoRA {number('phases of a')}"
        assert row == dict.fromkeys(names, "LoRA full") | {"tsm": small, "phased_dmd": phases}
    printed = fewstep("backbones").out
    assert all(name in printed for name in FAMILIES)
    assert all(f"{i}: {note}" in printed for i, note in enumerate(notes, 1))
    assert max(map(len, printed.splitlines())) <= WIDTH


def test_columns_fold_their_widest_cells():
    """Between words, no further than the width asks; a word that is longer stands out."""
    table = [["name", "what"], ["a", "one two three"], ["b", ""]]
    assert columns(table, 19) == columns(table) == "name  what\na     one two three\nb"
    assert columns(table, 13) == "name  what\na     one two\n      three\nb"
    assert columns(table, 4) == "name  what\na     one\n      two\n      three\nb"


def test_blocks_have_the_first_column_each():
    """As many of the others as fit: 1 + 2 + 3 + 2 + 3 are 11."""
    table = [["", "aaa", "bbb", "ccc"], ["r", "1", "2", "3"]]
    found = blocks(table, 11)
    assert found == [[["", "aaa", "bbb"], ["r", "1", "2"]], [["", "ccc"], ["r", "3"]]]
    assert all(max(map(len, columns(block).splitlines())) <= 11 for block in found)
