"""Where images or clips with captions come from: a folder, tar shards, a data set of the package datasets; as bytes."""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.distill import clips, pictures
from fewstep.distill.data_config import not_unicode
from fewstep.distill.pictures import Unusable
from fewstep.metrics.images import SIDECARS
from fewstep.samplers.errors import UserError, reason

SUFFIXES = (*pictures.SUFFIXES, *(suffix for suffix in clips.SUFFIXES if suffix not in pictures.SUFFIXES))
"""Of images and clips; `files.source` asks which of them a run learns from."""
TEXTS = (*SIDECARS, ".md")
"""What may share its name with a `.txt` that is no caption: a README, a list."""
COLUMN = "text"
"""Where captions stand unless `caption_column` says otherwise."""


@dataclass(frozen=True)
class Source:
    """N images, or N clips.

    Attributes:
        names: what a message calls each.
        texts: captions of each, one at least.
        read: the file of sample i.
    """

    names: Sequence[str]
    texts: Sequence[tuple[str, ...]]
    read: Callable[[int], bytes]


def source_of(train_data: str, column: str = "text") -> Source:
    """A folder of images or clips, or of shards, or a shard, or a pattern of shards."""
    path = Path(train_data)
    tars = path.is_dir() and any(path.glob("*.tar"))
    if tars and any(p.suffix.lower() in SUFFIXES for p in path.iterdir()):
        raise UserError(f"train_data {path}: has images or clips, and .tar shards; which? name a folder of one kind")
    if path.is_dir() and not tars:
        return folder(path, column)
    if path.is_dir() or ".tar" in path.name:
        return shards(train_data, column)
    raise UserError(f"train_data {train_data}: no such folder")


def read_text(path: str | Path, what: str) -> str:
    """A text file in UTF-8; UserError where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: cannot be read as text in UTF-8 ({type(error).__name__})") from error


def some(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _captions(value: Any, where: str) -> tuple[str, ...]:
    """One caption or a list of captions."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: must be a caption, or a list of captions; got {str(value)[:60]!r}")
    return tuple(valid(t.strip(), where) for t in texts)


def valid(text: str, where: str) -> str:
    """A text that tokenizers take; UserError for another."""
    if said := not_unicode(text):
        raise UserError(f"{where}: {text[:60]!a} {said}")
    return text


# a folder


def folder(root: Path, column: str = "text") -> Source:
    """Images and clips below a folder; captions in a `metadata.jsonl` beside them, or in a `.txt` of the same name."""
    # unlike Path.rglob this follows linked folders; a link that leads nowhere is refused when it is opened
    walk = glob.iglob(os.path.join(glob.escape(str(root)), "**", "*"), recursive=True, include_hidden=True)
    found = sorted(map(Path, walk))
    paths = sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.is_dir())
    listed = _metadata([p for p in found if p.name == "metadata.jsonl"], column)
    if unknown := [str(p.relative_to(root)) for p in _unknown(found, paths, listed)]:
        raise UserError(
            f"train_data {root}: {len(unknown)} files have a caption and no suffix of an image or a clip: {some(unknown)}; "
            f"read are {', '.join(SUFFIXES)}"
        )
    if not paths:
        raise UserError(f"train_data {root}: no images or clips there ({', '.join(SUFFIXES)})")
    missing = sorted(str(p.relative_to(root)) for p in listed.keys() - set(paths))
    if missing:
        raise UserError(
            f"train_data {root}: metadata.jsonl names {len(missing)} files that are not there: {some(missing)}"
        )
    texts, bare = [], []
    for path in paths:
        beside = path.with_suffix(".txt")
        if path in listed:
            texts.append(listed[path])
        elif beside.is_file():
            texts.append((read_text(beside, "caption").strip(),))
        else:
            bare.append(path.name)
    if bare:
        raise UserError(f"train_data {root}: {len(bare)} files lack a .txt caption, e.g. {some(bare, 1)}")

    def read(i: int) -> bytes:
        try:
            return paths[i].read_bytes()
        except OSError as error:
            raise Unusable(f"{paths[i]}: cannot be read ({error.strerror})") from error

    return Source([str(p) for p in paths], texts, read)


def _unknown(found: Sequence[Path], paths: Sequence[Path], listed: Collection[Path]) -> list[Path]:
    """Files with a caption of their own which nothing would read; a `.txt` alone may be anything."""
    there, taken = set(found), {p.with_suffix("") for p in paths}
    others = (p for p in found if p.suffix.lower() not in (*SUFFIXES, *TEXTS) and not p.is_dir())
    captioned = (p for p in others if p.with_suffix(".txt") in there and p.with_suffix("") not in taken)
    return sorted({*captioned, *(p for p in listed if p in there and p.suffix.lower() not in SUFFIXES)})


def _metadata(paths: Sequence[Path], column: str) -> dict[Path, tuple[str, ...]]:
    """Captions by file, of every `metadata.jsonl`: {"file_name": ..., "text": ...} in each line."""
    found = {}
    for path in paths:
        for number, line in enumerate(read_text(path, "captions").split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                file, value = path.parent / row["file_name"], row[column]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                keys = f'{{"file_name": ..., "{column}": ...}}'
                raise UserError(f"{where}: must be an object {keys} (caption_column names another key)") from error
            found[file] = (*found.get(file, ()), *_captions(value, where))
    return found


# shards


@dataclass(frozen=True)
class _Member:
    shard: Path
    name: str
    offset: int
    size: int
    data: bytes | None = None
    """Of a caption: read with the others of its shard, which is opened once."""

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise Unusable(f"{self.shard}: cannot be read ({error.strerror})") from error
        if len(data) < self.size:
            raise Unusable(f"{self.shard}/{self.name}: the shard ends before it")
        return data


def shards(pattern: str, column: str = COLUMN) -> Source:
    """Samples of webdataset's tar files: members of one name, an image or a clip, and a caption in `.txt` or `.json`.

    Args:
        pattern: a file, a folder of `.tar` files, or a pattern with `*` or `{000..127}`.
        column: of a caption in `.json`; another than the default, where it is there, goes before `.txt`.

    Members are read at their places, in any order: the archives must be uncompressed and on this machine.
    """
    found, texts, faults = [], [], []
    for path in shard_paths(pattern):
        for key, parts in _samples(path).items():
            seen = [m for ext, m in parts.items() if f".{ext}" in SUFFIXES]
            where = f"{path}/{key}"
            if len(seen) != 1:
                faults.append(f"{where} ({len(seen)} images or clips)")
            elif "json" in parts and ("txt" not in parts or (column != COLUMN and _has(parts["json"], column))):
                texts.append(_captions(_field(parts["json"], column), f"{where}.json, {column}"))
                found.append(seen[0])
            elif "txt" in parts:
                texts.append((_decoded(parts["txt"]).strip(),))
                found.append(seen[0])
            else:
                faults.append(f"{where} (no .txt, no .json)")
    if faults:
        raise UserError(
            f"train_data {pattern}: {len(faults)} samples are not an image or a clip with a caption: {some(faults)}"
        )
    if not found:
        raise UserError(f"train_data {pattern}: no images or clips in these shards")
    return Source([f"{m.shard}/{m.name}" for m in found], texts, lambda i: found[i].read())


def shard_paths(pattern: str) -> list[Path]:
    """Files of a pattern, in order; UserError where one is missing, or none is found."""
    if "://" in pattern:
        raise UserError(f"train_data {pattern}: shards must lie on this machine; download them first")
    if Path(pattern).is_dir():
        pattern = f"{pattern.rstrip('/')}/*.tar"
    counted = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if counted:
        first, last = counted.groups()
        numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
        paths = [Path(pattern[: counted.start()] + n + pattern[counted.end() :]) for n in numbers]
    else:
        path = Path(pattern)
        paths = sorted(path.parent.glob(path.name))
    missing = [str(p) for p in paths if not p.is_file()]
    if missing or not paths:
        raise UserError(f"train_data {pattern}: no such shard: {some(missing) or 'nothing matches'}")
    return paths


def _samples(path: Path) -> dict[str, dict[str, _Member]]:
    """Members of a shard by the name before the first dot, then by what follows."""
    found: dict[str, dict[str, _Member]] = {}
    twice = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    parent, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    kind = extension.lower()
                    text = archive.extractfile(member) if kind in ("txt", "json") else None
                    data = None if text is None else text.read()
                    parts = found.setdefault(f"{parent}/{stem}".lstrip("/"), {})
                    if kind in parts:
                        twice.append(member.name)
                    parts[kind] = _Member(path, member.name, member.offset_data, member.size, data)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar archive ({error})") from error
    if twice:
        raise UserError(f"{path}: {len(twice)} members have the name of an earlier one: {some(twice)}")
    return found


def _decoded(member: _Member) -> str:
    try:
        return member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"caption {member.shard}/{member.name}: cannot be read as text in UTF-8") from error


def _has(member: _Member, column: str) -> bool:
    try:
        return column in json.loads(_decoded(member))
    except (json.JSONDecodeError, TypeError):
        return False


def _field(member: _Member, column: str) -> Any:
    try:
        return json.loads(_decoded(member))[column]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        where = f"{member.shard}/{member.name}"
        raise UserError(f"{where}: must be an object with {column} (caption_column names another key)") from error


# the package datasets


def dataset(
    name: str, config: str | None, split: str, caption_column: str, column: str | None = None, moving: bool = False
) -> Source:
    """A data set of the package `datasets`: a folder written by `save_to_disk`, or whatever `load_dataset` finds.

    Args:
        name: of the set, or the folder.
        config: its configuration.
        split: of it.
        caption_column: of captions.
        column: of images or clips; None: captions alone are read.
        moving: whether that column is to hold clips.

    Raises:
        UserError: the package is not installed, the set, its split or a column is not there, or that of clips holds images,
            or the reverse.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "dataset_name: needs the package datasets (the extra [data]); try: pip install datasets"
        ) from error
    saved = any((Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
    except Exception as error:  # the package, pyarrow and the hub each have their own kinds
        raise UserError(f"dataset_name {name}: cannot be loaded ({reason(error)})") from error
    if isinstance(data, dict):
        if split not in data:
            raise UserError(f"dataset_name {name}: no split {split}; dataset_split is one of {', '.join(data)}")
        data = data[split]
    of_files = "video_column" if moving else "image_column"
    for key, wanted in ((of_files, column), ("caption_column", caption_column)):
        if wanted is not None and wanted not in data.column_names:
            raise UserError(f"dataset_name {name}: no column {wanted}; {key} is one of {', '.join(data.column_names)}")
    texts = [_captions(v, f"{name}, row {i}, {caption_column}") for i, v in enumerate(data[caption_column])]
    names = [f"{name}, row {i}" for i in range(len(texts))]
    if column is None:
        return Source(names, texts, lambda i: b"")
    ours, theirs = (datasets.Video, datasets.Image) if moving else (datasets.Image, datasets.Video)
    if isinstance(data.features[column], theirs):
        held, made = ("images", "clips") if moving else ("clips", "images")
        raise UserError(f"dataset_name {name}: {of_files} {column} holds {held}; this teacher makes {made}")
    try:
        files = data.cast_column(column, ours(decode=False))  # as they were saved, for the hash and the modes
    except Exception as error:  # pyarrow's own kinds
        raise UserError(f"dataset_name {name}: {of_files} {column} holds no files ({reason(error)})") from error

    def read(i: int) -> bytes:
        file = files[i][column]
        try:
            return file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise Unusable(f"{names[i]}: cannot be read ({error})") from error

    return Source(names, texts, read)
