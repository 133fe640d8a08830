"""report.html: whole in one file, the best of each figure marked, points where their values are."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.app.page import write
from fewstep.app.plot import BOTTOM, HEIGHT, TOP, plot, ticks
from fewstep.app.rows import Row
from fewstep.app.store import Cost, Store
from fewstep.metrics.scores import Scores

PROMPTS = ["a <cat> & a dog", "a house", "the sea", "a bird"]


def row(folder: Path, role: str, steps: int, fid: float, clip: list[float], level: int) -> Row:
    store = Store(folder, Path(f"{role}-{steps}"), {"prompts": PROMPTS}, 4)
    store.add(range(4), torch.full((4, 3, 8, 8), level, dtype=torch.uint8), Cost(4, 0.4, 4 * steps, None))
    metrics = {"fid": {"value": fid, "stderr": 0.5}, "clip": {"value": sum(clip) / 4, "stderr": 0.1}}
    scores = Scores()
    scores.update(range(4), clip=torch.tensor(clip))
    said = {"source": f"x/{role}", "role": role, "steps": steps, "nfe": steps, "guidance": 1.0, "scheduler": "ode"}
    said |= {"seconds_per_image": steps / 10, "n": 4, "metrics": metrics}
    return Row(said, store.files, PROMPTS, [0, 1, 2, 3], True, scores)


def test_sources_of_one_name_are_two_lines_and_pictures_may_have_any_size(tmp_path: Path):
    rows = [row(tmp_path / s, "student", n, n + 1.0, [1.0, 2.0, 3.0, 4.0], 9) for s in "ab" for n in (1, 2)]
    for i, one in enumerate(rows):
        one.row["source"] = f"runs/{'ab'[i // 2]}/student"
    wide = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    Store(tmp_path / "wide", Path("w"), {}, 1).add([0], wide, Cost(1, 0.1, 1, None))
    (rows[0].files[3],) = (tmp_path / "wide").rglob("*.png")
    rows[0].same_noise = False
    report: dict[str, Any] = {"n": 4, "seeds": [0, 1, 2, 3], "prompts": "p.txt", "rows": [r.row for r in rows]}
    write(tmp_path / "report.html", report, rows)
    html = (tmp_path / "report.html").read_text()
    assert "student a/student" in html
    assert "student b/student" in html
    assert html.count("<polyline") == 8  # of two figures, against two costs, for each source


def test_clips_move_at_their_own_rate(tmp_path: Path):
    """Of 40 frames every third, a second of 24 frames in a second; small ones bit for bit."""
    clips = torch.randint(0, 256, (4, 40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    store = Store(tmp_path, Path("c"), {}, 4, True)
    store.add(range(4), clips, Cost(4, 0.4, 4, None))
    still = row(tmp_path, "student", 2, 7.0, [4.0, 3.0, 9.0, 1.0], 90)
    moving = Row(still.row, store.files, PROMPTS, still.groups, True, still.scores, clips=True, frames_per_second=24)
    write(tmp_path / "report.html", {"n": 4, "seeds": [0], "prompts": "p.txt", "rows": [moving.row]}, [moving])
    found = re.findall(r"data:image/webp;base64,([^\"]+)", (tmp_path / "report.html").read_text())
    assert len(found) == 4 + 4  # of the grid, and the worst and best two prompts
    shown = Image.open(BytesIO(base64.b64decode(found[1])))
    assert shown.n_frames == 14
    shown.seek(2)
    shown.load()
    assert shown.info["duration"] == round(1000 * 3 / 24)
    assert torch.equal(torch.from_numpy(np.array(shown.convert("RGB"))).permute(2, 0, 1), clips[1, 6])


@pytest.fixture
def page(tmp_path: Path) -> str:
    rows = [
        row(tmp_path, "teacher", 8, 5.0, [1.0, 2.0, 3.0, 4.0], 200),
        row(tmp_path, "student", 2, 7.0, [4.0, 3.0, 9.0, 1.0], 90),
        row(tmp_path, "student", 1, 9.0, [1.0, 1.0, 1.0, 2.0], 30),
    ]
    report: dict[str, Any] = {"n": 4, "seeds": [0, 1, 2, 3], "prompts": "p.txt", "rows": [r.row for r in rows]}
    write(tmp_path / "report.html", report | {"notes": ["few <images>"]}, rows)
    return (tmp_path / "report.html").read_text()


class Outline(HTMLParser):
    """Open elements, to see that each is closed, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]
        assert tag != "script"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_whole_and_needs_nothing_from_elsewhere(page: str):
    outline = Outline()
    outline.feed(page.removeprefix("<!doctype html>"))
    assert outline.open == []
    assert len(outline.fetched) == 3 * 4 + 3 * 4  # grid, and two least and two best of each row
    assert all(source.startswith("data:image/png;base64,") for source in outline.fetched)
    assert "url(" not in page
    assert "@import" not in page
    assert "a &lt;cat&gt; &amp; a dog" in page
    assert "few &lt;images&gt;" in page


def test_the_best_of_each_figure_is_marked(page: str):
    """The lowest FID, the highest CLIP score."""
    assert re.findall(r'class="best">([\d.]+)', page) == ["5.00", "4.25"]


def test_rows_that_are_alike_are_best_together_and_none_where_all_are(tmp_path: Path):
    rows = [row(tmp_path, "student", n, fid, [3.0] * 4, 9) for n, fid in ((1, 7.0), (2, 5.0), (4, 5.0))]
    report: dict[str, Any] = {"n": 4, "seeds": [0, 1, 2, 3], "prompts": "p.txt", "rows": [r.row for r in rows]}
    write(tmp_path / "report.html", report, rows)
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'class="best">([\d.]+)', html) == ["5.00", "5.00"]


def test_prompts_that_are_followed_least_and_best(page: str):
    assert "<h2>Worst and best prompts</h2>\n<p>By clip, the mean over" in page
    of_student = page.split("<summary>student, 2 steps</summary>")[1].split("</details>")[0]
    assert re.findall(r"<b>([\d.]+)</b> ([^<]+)<", of_student) == [
        ("1.00", "a bird"),
        ("3.00", "a house"),
        ("9.00", "the sea"),
        ("4.00", "a &lt;cat&gt; &amp; a dog"),
    ]


def test_points_are_where_their_values_are():
    """From 1 to 4 on a logarithmic axis 2 lies in the middle; y runs from the ends of the bars with a margin of 6%."""
    svg = plot("t", "NFE", {"a": [(1, 10, 0), (2, 20, 0), (4, 30, 0)]}, {}, ["b", "a"])
    points = [(float(x), float(y)) for x, y in re.findall(r'circle cx="([\d.]+)" cy="([\d.]+)" r="3.5"', svg)]
    assert svg.count("var(--s1)") == 7  # a line, and of each point a circle and a bar
    across, down = [x for x, _ in points], [y for _, y in points]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.11)
    inner = HEIGHT - TOP - BOTTOM
    assert down == pytest.approx([HEIGHT - BOTTOM - inner * s for s in (0.06 / 1.12, 0.5, 1.06 / 1.12)], abs=0.06)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0.94, 3.06, [1, 1.5, 2, 2.5, 3]), (-0.3, 0.5, [-0.2, 0, 0.2, 0.4]), (9.7, 30.3, [10, 15, 20, 25, 30])],
)
def test_ticks_are_round_numbers_within(low: float, high: float, want: list[float]):
    assert ticks(low, high) == want


def test_labels_under_the_axis_do_not_touch():
    """Of three digits and a point they are 30 pixels wide; points keep their places."""
    svg = plot("t", "s", {"a": [(x, x, 0) for x in (0.144, 0.268, 0.397, 0.421, 3.73)]}, {}, ["a"])
    labels = re.findall(r'<text x="([\d.]+)" y="\d+" font-size="11" text-anchor="middle">(0?\d?\.\d+)<', svg)
    assert [text for _, text in labels] == ["0.144", "0.268", "3.73"]
    places = [float(x) for x, _ in labels]
    assert min(b - a for a, b in pairwise(places)) > 32
    assert svg.count("<circle") == 5


def test_a_prompt_stands_once_among_worst_and_best(tmp_path: Path):
    """Though it has two groups of images, as where there are more images than prompts."""
    drawn = row(tmp_path, "student", 2, 7.0, [4.0, 3.0, 8.0, 1.0], 90)
    drawn.prompts = ["the sea", "a bird", "the sea", "a bird"]
    write(tmp_path / "report.html", {"n": 4, "seeds": [0], "prompts": "p", "rows": [drawn.row], "notes": []}, [drawn])
    shown = re.findall(r"<b>([\d.]+)</b> ([\w ]+)", (tmp_path / "report.html").read_text())
    assert shown == [("2.00", "a bird"), ("6.00", "the sea")]
