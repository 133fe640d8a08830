"""Where images with captions come from, and what is said of a folder, a shard or a data set that is not as it should be."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.distill.pictures import Unusable, picture
from fewstep.distill.sources import Source, dataset, folder, shard_paths, source_of
from fewstep.samplers.errors import UserError
from tests.distill.runs import write_images


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    """An uncompressed tar archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return path


def listing(path: Path, *rows: dict[str, Any]) -> None:
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(source: Source) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    return {Path(n).name: (source.read(i), source.texts[i]) for i, n in enumerate(source.names)}


def test_captions_in_a_list(tmp_path: Path):
    """Beside the images it names, also below; several captions of one image; another key; the rest have a .txt."""
    write_images(tmp_path, 3)
    write_images(tmp_path / "deep", 1)
    listing(tmp_path, {"file_name": "0.png", "text": " zero "}, {"file_name": "1.png", "text": ["one", "eins"]})
    listing(tmp_path / "deep", {"file_name": "0.png", "text": "below"})
    found = folder(tmp_path)
    assert list(found.texts) == [("zero",), ("one", "eins"), ("thing 2",), ("below",)]
    assert [found.read(i) for i in range(4)] == [
        (tmp_path / n).read_bytes() for n in ("0.png", "1.png", "2.png", "deep/0.png")
    ]
    listing(tmp_path, {"file_name": "0.png", "title": "nought", "text": "zero"})
    listing(tmp_path, *({"file_name": "0.png", "text": text} for text in ("a", "b", "c")))  # as COCO's
    assert folder(tmp_path).texts[0] == ("a", "b", "c")
    listing(tmp_path, {"file_name": "0.png", "title": "nought", "text": "zero"})
    (tmp_path / "deep/metadata.jsonl").unlink()
    assert folder(tmp_path, "title").texts[0] == ("nought",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: listing(p, {"file_name": "none.png", "text": "a"}, {"file_name": "deep/no.png", "text": "a"}),
            "train_data {p}: metadata.jsonl names 2 files that are not there: deep/no.png, none.png",
        ),
        (
            lambda p: (p / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}'),
            '{p}/metadata.jsonl, line 2: must be an object {{"file_name": ..., "text": ...}} (caption_column',
        ),
        (lambda p: (p / "metadata.jsonl").write_text("not JSON"), "{p}/metadata.jsonl, line 1: must be an object"),
        (
            lambda p: listing(p, {"file_name": "0.png", "text": 3}),
            "{p}/metadata.jsonl, line 1: must be a caption, or a list of captions; got '3'",
        ),
        (
            lambda p: (p / "photo.HEIC").write_bytes(b"x"),
            "train_data {p}: 1 files lack a .txt caption, e.g. photo.HEIC",
        ),
        (
            lambda p: [(p / n).write_bytes(b"x") for n in ("b.xcf", "b.txt", "c", "c.txt", "d.dds", "e.JXR", "e.txt")],
            "train_data {p}: 3 files have a caption and no suffix of an image or a clip: b.xcf, c, e.JXR; read are .png, ",
        ),
        (
            lambda p: (listing(p, {"file_name": "b.xcf", "text": "b"}), (p / "b.xcf").write_bytes(b"x")),
            "train_data {p}: 1 files have a caption and no suffix of an image or a clip: b.xcf; read are ",
        ),
    ],
)
def test_a_list_that_is_wrong(tmp_path: Path, spoil: Callable[[Path], Any], message: str):
    write_images(tmp_path, 3)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        folder(tmp_path)
    assert str(caught.value).startswith(message.format(p=tmp_path))


def test_suffixes_of_images_and_what_is_no_caption(tmp_path: Path):
    """Every spelling is read; a README, a list of prompts, and what else lies beside an image that is, are no captions."""
    from PIL import Image

    for name, kind in (("a.png", "PNG"), ("b.jfif", "JPEG"), ("c.tga", "TGA"), ("d.JPE", "JPEG"), ("e.JPG", "JPEG")):
        Image.new("RGB", (12, 8), (255, 0, 0)).save(tmp_path / name, kind)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    for name in ("README.txt", "README.md", "prompts.txt", "a.npz", "notes.xcf"):
        (tmp_path / name).write_text("no caption")
    found = folder(tmp_path)
    assert [texts[0] for texts in found.texts] == [Path(name).name for name in found.names]
    assert len(found.names) == 5
    for i, name in enumerate(found.names):
        assert picture(found.read(i), name).getpixel((6, 4))[0] > 250


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: captions as text, as JSON in either key; names with dots and folders, and files of other kinds."""
    first = {
        "a.png": b"A",
        "a.txt": " one ",
        "b/c.jpg": b"BC",
        "b/c.json": '{"caption": "no", "text": ["two", "zwei"]}',
    }
    first |= {"a.seg.png": b"mask", "a.json": '{"text": "not this one"}'}
    second = {"a.txt": b"three", "a.webp": b"x" * 1000}
    for i, members in enumerate((first, second)):
        data = {k: v.encode() if isinstance(v, str) else v for k, v in members.items()}
        write_shard(tmp_path / f"set/{i + 8:03}.tar", data)
    return tmp_path / "set"


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{008..009}.tar", "/00[89].tar"])
def test_shards(shards: Path, pattern: str):
    """In the order of the names, whatever the members' own; each image is read at its place, in any order."""
    found = source_of(f"{shards}{pattern}")
    assert found.names == [f"{shards}/008.tar/a.png", f"{shards}/008.tar/b/c.jpg", f"{shards}/009.tar/a.webp"]
    assert list(found.texts) == [("one",), ("two", "zwei"), ("three",)]
    assert [found.read(i) for i in (2, 0, 1, 0)] == [b"x" * 1000, b"A", b"BC", b"A"]


def test_one_shard_and_another_key(shards: Path):
    (shards / "009.tar").unlink()
    assert list(source_of(f"{shards}/008.tar", "caption").texts) == [("one",), ("no",)]
    both = {"a.png": b"A", "a.txt": b"alt text", "a.json": b'{"recaption": "a fox"}'}
    write_shard(shards / "010.tar", both | {"b.png": b"B", "b.txt": b"only", "b.json": b"[]"})
    assert list(source_of(f"{shards}/010.tar").texts) == [("alt text",), ("only",)]
    assert list(source_of(f"{shards}/010.tar", "recaption").texts) == [("a fox",), ("only",)]


def test_a_name_that_comes_twice_in_a_shard_is_refused(tmp_path: Path):
    """As where shards were joined: the second would take the place of the first."""
    path = tmp_path / "joined.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("0.png", b"A"), ("0.txt", b"a"), ("0.PNG", b"B"), ("0.txt", b"b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    with pytest.raises(UserError, match=r"joined\.tar: 2 members have the name of an earlier one: 0\.PNG, 0\.txt"):
        source_of(str(path))


def test_a_shard_is_opened_once_for_its_captions(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "open", None)
    assert len(source_of(str(shards)).names) == 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"A"}, r"1 samples are not an image or a clip with a caption: .*bad.tar/a \(no .txt, no .json\)"),
        (
            {"a.txt": b"A", "b.cls": b"1"},
            r"2 samples .*bad.tar/a \(0 images or clips\), .*bad.tar/b \(0 images or clips\)",
        ),
        ({"a.png": b"A", "a.jpg": b"A", "a.txt": b"A"}, r"1 samples .*a \(2 images or clips\)"),
        ({"a.png": b"A", "a.json": b"{}"}, r"bad.tar/a.json: must be an object with text \(caption_column"),
        ({"a.png": b"A", "a.txt": b"\xff\xfe"}, r"caption .*bad.tar/a.txt: cannot be read as text in UTF-8"),
        ({}, "no images or clips in these shards"),
    ],
)
def test_a_shard_that_is_wrong(tmp_path: Path, members: dict[str, bytes], message: str):
    with pytest.raises(UserError, match=message):
        source_of(str(write_shard(tmp_path / "bad.tar", members)))


def test_a_shard_that_cannot_be_read(tmp_path: Path):
    """Compressed, no archive, cut off while it was copied, far away, or not there."""
    whole = write_shard(tmp_path / "whole.tar", {"a.txt": b"one", "a.png": b"x" * 5000}).read_bytes()
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "whole.tar", "a.png")
    (tmp_path / "text.tar").write_bytes(b"text" * 500)
    for name in ("packed.tar.gz", "text.tar"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as an uncompressed tar archive"):
            source_of(str(tmp_path / name))
    (tmp_path / "whole.tar").write_bytes(whole[:4000])
    with pytest.raises(UserError, match=r"whole.tar.*(ends before it|cannot be read)"):
        source_of(str(tmp_path / "whole.tar")).read(0)
    for pattern, message in [
        ("https://host/{000..001}.tar", "must lie on this machine"),
        (f"{tmp_path}/none-*.tar", "no such shard: nothing matches"),
        (f"{tmp_path}/{{0..1}}.tar", r"no such shard: .*/0.tar, .*/1.tar"),
    ]:
        with pytest.raises(UserError, match=message):
            shard_paths(pattern)
    with pytest.raises(UserError, match="no such folder"):
        source_of(str(tmp_path / "none"))


def test_links_are_followed_and_none_is_left_out(tmp_path: Path):
    """A linked folder's images and list, a hidden file; a link that leads nowhere is refused where it is read."""
    far = write_images(tmp_path / "far", 2)
    for i, image in enumerate(sorted(far.glob("*.png"))):
        image.with_suffix(".txt").unlink()
        with (far / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": image.name, "text": f"listed {i}"}) + "\n")
    home = write_images(tmp_path / "near", 1)
    (home / "linked").symlink_to(tmp_path / "far")
    assert [t for t in folder(home).texts if t[0].startswith("listed")] == [("listed 0",), ("listed 1",)]
    assert len(folder(home).names) == 3
    (home / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (home / "gone.txt").write_text("a")
    found = folder(home)
    with pytest.raises(Unusable, match=r"gone\.png: cannot be read"):
        found.read([Path(name).name for name in found.names].index("gone.png"))
    write_shard(home / "old.tar", {"0.png": b"x", "0.txt": b"a"})
    with pytest.raises(UserError, match=r"near: has images or clips, and \.tar shards; which\?"):
        source_of(str(home))


def test_half_a_character_is_refused(tmp_path: Path):
    """A caption cut inside an emoji; a separator of Unicode ends no line."""
    home = write_images(tmp_path, 1)
    (name,) = (p.name for p in home.glob("*.png"))
    (home / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a\u2028b"}, ensure_ascii=False))
    assert folder(home).texts == [("a\u2028b",)]
    (home / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a \ud83d"}))
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: 'a \\ud83d' is no valid Unicode, at character 3"):
        folder(home)


@dataclass
class Image:
    """The package's type of a column of images."""

    decode: bool = True


@dataclass
class Video:
    """That of a column of clips."""

    decode: bool = True


class Table:
    """What a data set of the package does here: columns, rows, files as they were saved."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any], decoded: bool = True):
        self.columns, self.features, self.decoded, self.column_names = columns, features, decoded, list(columns)

    def cast_column(self, name: str, kind: Any) -> Table:
        assert not kind.decode
        if not isinstance(self.columns[name][0], dict):
            raise ValueError("Unsupported cast\nfrom string")
        return Table(self.columns, {**self.features, name: kind}, decoded=False)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            assert self.decoded  # a column of captions: the whole of it
            return iter(self.columns[key])  # since release 4 no list
        assert not self.decoded  # never through the package's own decoder, which loses modes and bytes
        return {k: v[key] for k, v in self.columns.items()}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple]:
    """The package `datasets`, in as far as it is used; notes how sets are asked for."""
    (tmp_path / "1.png").write_bytes(b"second")
    files = [{"bytes": b"first", "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "1.png")}]
    columns = {"picture": files, "clip": files, "bare": files, "said": ["one", ["two", "zwei"]]}
    data = {"train": Table(columns, {"picture": Image(), "clip": Video(), "bare": None, "said": None})}
    asked: list[tuple] = []
    stub = SimpleNamespace(
        **{"Image": Image, "Video": Video},
        load_from_disk=lambda name: asked.append(("disk", name)) or data["train"],
        load_dataset=lambda name, config: asked.append(("load", name, config)) or data,
    )
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return asked


def test_a_data_set_of_the_package(package: list[tuple], tmp_path: Path):
    """By name with its configuration and split, or from the folder of save_to_disk: bytes, or a path to them."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    for name in ("org/set", str(tmp_path / "saved")):
        for column, moving in [("picture", False), ("bare", False), ("clip", True), ("bare", True)]:
            found = dataset(name, "small", "train", "said", column, moving)
            assert list(found.texts) == [("one",), ("two", "zwei")]
            assert [found.read(i) for i in range(2)] == [b"first", b"second"]
            assert found.names[1] == f"{name}, row 1"
    assert package == [("load", "org/set", "small")] * 4 + [("disk", str(tmp_path / "saved"))] * 4
    assert list(dataset("org/set", None, "train", "said").texts) == [("one",), ("two", "zwei")]


@pytest.mark.parametrize(
    ("split", "caption", "column", "moving", "message"),
    [
        ("test", "said", "picture", False, "dataset_name org/set: no split test; dataset_split is one of train"),
        ("train", "said", "image", False, "no column image; image_column is one of picture, clip, bare, said"),
        ("train", "said", "video", True, "no column video; video_column is one of picture, clip, bare, said"),
        ("train", "text", "picture", False, "no column text; caption_column is one of picture, clip, bare, said"),
        ("train", "said", "clip", False, "image_column clip holds clips; this teacher makes images"),
        ("train", "said", "picture", True, "video_column picture holds images; this teacher makes clips"),
        ("train", "said", "said", False, r"image_column said holds no files \(Unsupported cast\)$"),
    ],
)
def test_what_a_data_set_lacks(package: list[tuple], split: str, caption: str, column: str, moving: bool, message: str):
    with pytest.raises(UserError, match=message):
        dataset("org/set", None, split, caption, column, moving)


def test_pictures_of_the_package_itself(tmp_path: Path):
    """A folder of save_to_disk, in the package's own format: the files as they were, to the byte, and both captions."""
    import datasets

    paths = [str(path) for path in sorted(write_images(tmp_path / "images", 2).glob("*.png"))]
    features = datasets.Features({"picture": datasets.Image(), "said": datasets.List(datasets.Value("string"))})
    rows = {"picture": paths, "said": [["one"], ["two", "zwei"]]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    before = [Path(path).read_bytes() for path in paths]
    shutil.rmtree(tmp_path / "images")
    found = dataset(str(tmp_path / "saved"), None, "train", "said", "picture")
    assert [found.read(i) for i in (1, 0)] == before[::-1]
    assert found.texts == [("one",), ("two", "zwei")]
    with pytest.raises(UserError, match="no column image; image_column is one of picture, said"):
        dataset(str(tmp_path / "saved"), None, "train", "said", "image")


def test_the_package_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs the package datasets \(the extra \[data\]\); try: pip install datasets$"
    ):
        dataset("org/set", None, "train", "text")
