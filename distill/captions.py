"""Prompts from files: a text of one a line, or the tables that captions of COCO and its like come in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.distill.sources import read_text, valid
from fewstep.samplers.errors import UserError

COLUMNS = ("caption", "prompt", "text", "caption_1")
"""Names of the column with the prompt, the first that a table has."""

TABLES = (".csv", ".tsv", ".json", ".jsonl")


def is_table(path: str | Path) -> bool:
    """Whether a file's name says that it is a table of captions."""
    return Path(path).suffix.lower() in TABLES


def read_captions(path: str | Path) -> list[str]:
    """Prompts of a file.

    A text holds one a line. A table (.csv, .tsv, .json, .jsonl) has a column of `COLUMNS`; .json is a list of strings or
    of objects, or COCO's `{"annotations": [{"image_id": ..., "caption": ...}]}`. Where rows have an `image_id` the first
    caption of each image is taken, as COCO-30k does.

    Raises:
        UserError: the file cannot be read, has no such column, or a caption is empty.
    """
    path = Path(path)
    if not is_table(path):
        return read_prompts(path)
    found, images = [], set()
    for number, row in enumerate(_rows(path), 1):
        caption = row if isinstance(row, str) else _caption(path, row)
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"prompts {path}: caption {number} is empty")
        image = row.get("image_id") if isinstance(row, dict) else None
        if not isinstance(image, str | int | float | None):
            raise UserError(f"prompts {path}: the image_id of caption {number} must be a number or a text")
        if image is None or image not in images:
            found.append(" ".join(valid(caption, f"prompts {path}: caption {number}").split()))
        images.add(image)
    if not found:
        raise UserError(f"prompts {path}: the table holds no caption")
    return found


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one a line, blank lines left out; UserError where there are none."""
    prompts = [line.strip() for line in read_text(path, "prompts").split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"prompts {path}: the file holds no prompt; one a line is expected")
    return prompts


def _rows(path: Path) -> Iterator[Any]:
    text, kind = read_text(path, "prompts"), path.suffix.lower()
    try:
        if kind == ".json":
            whole = json.loads(text)
            yield from whole.get("annotations", []) if isinstance(whole, dict) else whole
        elif kind == ".jsonl":
            yield from (json.loads(line) for line in text.split("\n") if line.strip())
        else:
            yield from csv.DictReader(io.StringIO(text), delimiter="\t" if kind == ".tsv" else ",")
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"prompts {path}: not a {kind[1:]} table of captions ({error})") from error


def _caption(path: Path, row: Any) -> Any:
    names = row if isinstance(row, dict) else {}
    column = next((c for c in COLUMNS if c in names), None)
    if column is None:
        said = ", ".join(map(str, names)) or "none"
        raise UserError(f"prompts {path}: no column {', '.join(COLUMNS[:-1])}; it has {said}")
    return row[column]
