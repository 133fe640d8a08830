"""The tables of methods and backbones say what the code says."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.app.tables import backbones, methods, remarks
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
    assert table["tsm"]["needs"] == "images, student_config"
    assert table["tsm"]["forwards / backwards per iteration"] == "2 / 1"
    assert (table["dmd2"]["needs"], table["dmd2"]["trains"]) == ("prompts", "student, fake_score")
    # SiD guided three times: teacher 2, fake score 2 and once more, 2 to train it, the student 1; half a step of rollout
    assert table["sid"]["forwards / backwards per iteration"] == ("9 / 7 (student and fake_score); 3 / 2 (fake_score)")
    assert "2405.14867" in table["dmd2"]["papers (arXiv)"]
    assert all(name in fewstep("methods").out for name in METHODS)


def test_backbones(fewstep: Callable[..., Answer]):
    """What each method makes of each, and why not where it does not. tests/distill/test_backbones.py trains them."""
    head, *rows = backbones()
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table.keys() == FAMILIES.keys()
    assert table["WanPipeline"]["networks"] == "transformer, transformer_2"
    small = "tsm with full weights alone"
    others = {name: row["methods"] for name, row in table.items()}
    assert others.pop("WanPipeline") == f"all; {small}"
    assert set(others.values()) == {f"all; not phased_dmd; {small}", f"all; phased_dmd as LoRA alone; {small}"}
    assert others["StableDiffusionPipeline"] == f"all; phased_dmd as LoRA alone; {small}"
    fused = {name for name, row in table.items() if row["students"] == "LoRA*, full"}
    assert fused == {f"{n}Pipeline" for n in ("ConsistencyModel", "DDPM", "DiT", "PixArtAlpha", "PixArtSigma")}
    printed = fewstep("backbones").out
    assert all(name in printed for name in FAMILIES)
    assert all(line in printed for line in remarks())
    assert not any("is no LoRA" in line for line in remarks())  # the table says which way it does
    assert {name for name, row in others.items() if "not phased_dmd" in row} == fused
    assert any(
        line.startswith("not phased_dmd: needs a network for each phase, as Wan 2.2 has, or") for line in remarks()
    )
