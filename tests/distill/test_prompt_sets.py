"""Prompts of a report: balanced, several seeds each, the same for every row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fewstep.distill.prompt_sets import category_captions, full_captions, held_out_captions, prompt_set
from fewstep.metrics.emoji.drawings import CATEGORIES, COLORS, HELD_OUT, NAMES
from fewstep.samplers.errors import UserError


def test_every_prompt_has_sixteen_seeds_in_a_large_set():
    prompts = prompt_set("embedded:emoji", 2000, seed=3)
    assert set(Counter(prompts.groups).values()) == {16}
    assert len({(g, p) for g, p in zip(prompts.groups, prompts.prompts, strict=True)}) == 125
    assert prompts.seeds == list(range(10_003, 12_003))
    # eighty captions, of which 45 are drawn a second time
    assert Counter(Counter(prompts.prompts).values()) == {16: 35, 32: 45}


def test_the_first_images_are_of_different_prompts():
    prompts = prompt_set("embedded:emoji", 200)
    assert len(set(prompts.prompts[:8])) == 8
    assert set(Counter(prompts.groups).values()) <= {2, 3}


def test_another_seed_is_another_order_of_the_same_captions():
    one, other = (prompt_set("embedded:emoji", 1280, seed) for seed in (0, 1))
    assert one.prompts != other.prompts
    assert sorted(one.prompts) == sorted(other.prompts)
    assert prompt_set("embedded:emoji", 1280, 0) == one


def test_captions_of_the_embedded_sets():
    assert len(category_captions()) == len(CATEGORIES) * len(COLORS)
    assert len(full_captions()) == len(NAMES) * len(COLORS) - len(HELD_OUT)
    assert not set(full_captions()) & set(held_out_captions())
    assert len(held_out_captions()) == len(HELD_OUT)


def test_a_file_of_few_prompts_is_repeated(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na dog\n")
    prompts = prompt_set(str(path), 8)
    assert Counter(prompts.prompts) == {"a cat": 4, "a dog": 4}
    assert not prompts.embedded
    assert prompt_set(["a cat", "a dog"], 8).prompts == prompts.prompts


def test_an_unknown_name_lists_the_shipped():
    with pytest.raises(UserError, match=r"embedded:cats: no such embedded prompts; shipped: embedded:emoji, "):
        prompt_set("embedded:cats", 8)
