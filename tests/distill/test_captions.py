"""Prompts from tables: the column that is taken, one caption for each image, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.distill.captions import read_captions
from fewstep.distill.prompt_sets import prompt_set
from fewstep.samplers.errors import UserError

CSV = 'image_id,file,caption\n7,a.jpg,"a cat, asleep"\n7,a.jpg,the same cat\n9,b.jpg,a dog \n'
COCO = {"annotations": [{"image_id": 7, "caption": "a cat, asleep"}, {"image_id": 7, "caption": "the same cat"}]}
COCO["annotations"].append({"image_id": 9, "caption": "a dog\n"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.tsv", 'prompt\tseed\n"a cat, asleep"\t1\na dog\t2\n'),
        ("a.json", json.dumps(COCO)),
        ("b.json", '["a cat, asleep", "a dog"]'),
        ("a.jsonl", '{"text": "a cat, asleep"}\n\n{"text": "a dog"}\n'),
        ("a.txt", "a cat, asleep\n\na dog\n"),
    ],
)
def test_captions_of_every_kind_of_file(tmp_path: Path, name: str, text: str):
    """Of an image with several captions the first, as COCO-30k takes them."""
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == ["a cat, asleep", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "id,title\n1,a cat\n", "no column caption, prompt, text; it has id, title"),
        ("a.csv", "caption\na cat\n  \n", "caption 2 is empty"),
        ("a.csv", "caption\n", "the table holds no caption"),
        ("a.json", '{"annotations": [', "not a json table of captions"),
        ("a.json", "[1, 2]", "no column caption, prompt, text; it has none"),
        ("a.jsonl", "a cat\n", "not a jsonl table of captions"),
        ("a.json", '[{"image_id": [1], "caption": "a"}]', "the image_id of caption 1 must be a number or a text"),
    ],
)
def test_refusals_name_the_file_and_what_is_wrong(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"prompts .*{name}: {said}"):
        read_captions(tmp_path / name)


def test_a_table_gives_each_caption_once_and_a_text_several_times(tmp_path: Path):
    (tmp_path / "a.csv").write_text("caption\n" + "\n".join(f"number {i}" for i in range(30)))
    (tmp_path / "a.txt").write_text("\n".join(f"number {i}" for i in range(30)))
    of_table, of_text = (prompt_set(str(tmp_path / f"a.{kind}"), 20) for kind in ("csv", "txt"))
    assert (len(set(of_table.prompts)), len(set(of_text.prompts))) == (20, 10)
    assert len(set(prompt_set(str(tmp_path / "a.csv"), 20, variants=4).prompts)) == 5
    with_one = prompt_set(str(tmp_path / "a.txt"), 6, variants=40)
    assert with_one.groups == [0] * 6
