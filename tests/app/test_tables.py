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
    assert (table["dmd2"]["needs"], table["dmd2"]["trains"]) == ("prompts", "student, fake_score")
    assert "2405.14867" in table["dmd2"]["papers (arXiv)"]
    assert all(name in fewstep("methods").out for name in METHODS)


def test_backbones(fewstep: Callable[..., Answer]):
    """What each method makes of each; clips are trained from prompts alone. tests/distill/test_backbones.py trains them."""
    head, *rows = backbones()
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table.keys() == FAMILIES.keys()
    assert table["WanPipeline"]["networks"] == "transformer, transformer_2"
    assert {m: table["WanPipeline"][m] for m in ("dmd2", "lcm")} == {"dmd2": "LoRA, full", "lcm": "-"}
    assert {table[f"{name}Pipeline"]["lcm"] for name in ("DDPM", "DiT", "PixArtAlpha")} == {"LoRA*, full"}
    assert table["StableDiffusionPipeline"]["lcm"] == "LoRA, full"
    printed = fewstep("backbones").out
    assert all(name in printed for name in FAMILIES)
    assert all(line in printed for line in remarks())
    assert any("lcm of WanPipeline" in line and "needs clips" in line for line in remarks())
