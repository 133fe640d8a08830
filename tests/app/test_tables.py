"""The tables of methods and backbones say what the code says."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.app.tables import backbones, methods
from fewstep.distill.config import METHODS
from fewstep.samplers.load import FAMILIES
from tests.app.conftest import Answer


def test_methods(fewstep: Callable[..., Answer]):
    """LCM: the teacher twice (guidance), the target, the student; ordinary training: one call."""
    head, *rows = methods()
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table.keys() == METHODS.keys()
    assert table["lcm"]["forwards / backwards per iteration"] == "4 / 1"
    assert table["pretrain"]["forwards / backwards per iteration"] == "1 / 1"
    assert (table["dmd2"]["needs"], table["dmd2"]["trains"]) == ("prompts", "student, fake_score")
    # SiD guided three times: teacher 2, fake score 2 and once more, 2 to train it, the student 1; half a step of rollout
    assert table["sid"]["forwards / backwards per iteration"] == ("9 / 7 (student and fake_score); 3 / 2 (fake_score)")
    assert "2405.14867" in table["dmd2"]["papers (arXiv)"]
    assert all(name in fewstep("methods").out for name in METHODS)


def test_backbones(fewstep: Callable[..., Answer]):
    rows = {row[0]: row[1:] for row in backbones()[1:]}
    assert rows.keys() == FAMILIES.keys()
    assert rows["WanPipeline"][0] == "transformer, transformer_2"
    assert rows["DDPMPipeline"][1] == "full (a LoRA is fused)"
    assert all(name in fewstep("backbones").out for name in FAMILIES)
