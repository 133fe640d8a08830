"""What a run's report says, and that its figures are those of the images that lie beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fewstep.distill.evaluation import REFERENCE_SEED
from fewstep.distill.metric_names import EMOJI
from fewstep.distill.picture import cut
from fewstep.distill.prompt_sets import prompt_set
from fewstep.distill.report import PICTURE, SHEETS, report_run
from fewstep.distill.table import cell

ROWS = [("reference", 0), ("teacher", 8), ("teacher", 1), ("student", 4), ("student", 2)]


@pytest.fixture(scope="module")
def report(trained: Path) -> dict:
    return json.loads((trained / "report.json").read_text())


def test_schema(report: dict, trained: Path, teacher: Path):
    keys = {"source", "role", "steps", "nfe", "guidance", "scheduler", "seconds_per_image", "metrics"}
    assert (report["schema"], report["n"]) == (1, 8)
    assert [b["prompts"] for b in (report, *report["blocks"])] == ["embedded:emoji", "embedded:emoji/full"]
    for block in (report, *report["blocks"]):
        assert (block["n"], block["seeds"]) == (8, list(range(10_000, 10_008)))
        assert [(row["role"], row["steps"]) for row in block["rows"]] == ROWS
        for row in block["rows"]:
            assert row.keys() == keys
            assert tuple(row["metrics"]) == EMOJI
            assert all(figure.keys() == {"value", "stderr"} for figure in row["metrics"].values())
        teachers, students = block["rows"][1:3], block["rows"][3:]
        # guidance is two rows a step
        assert [(r["nfe"], r["guidance"], r["source"]) for r in teachers] == [
            (16, 3, str(teacher)),
            (2, 3, str(teacher)),
        ]
        assert [(r["nfe"], r["guidance"], r["source"]) for r in students] == [
            (4, 1, str(trained)),
            (2, 1, str(trained)),
        ]
        assert all(r["seconds_per_image"] > 0 for r in teachers + students)


def test_figures_are_those_of_the_images(report: dict, trained: Path):
    """Cut out of the sheets, judged again."""
    from fewstep.metrics.emoji.metrics import emoji_metrics, renderings

    for number, block in enumerate((report, *report["blocks"])):
        prompts = prompt_set(block["prompts"], report["n"])
        reference = renderings(prompts.prompts, REFERENCE_SEED)
        files = sorted((trained / SHEETS / (str(number) if number else "")).glob("*.png"))
        assert len(files) == len(ROWS)
        for file, row in list(zip(files, block["rows"], strict=True))[number::3]:  # a few are enough
            images = cut(Image.open(file), report["n"], 64, 64)
            found = emoji_metrics(images, prompts.prompts, reference, prompts.groups)
            for name in EMOJI:
                assert row["metrics"][name] == pytest.approx(
                    dict(zip(("value", "stderr"), found[name], strict=True)), rel=1e-4, abs=1e-6
                )


def test_a_copy_of_the_teacher_elsewhere_gives_the_same_report(
    report: dict, trained: Path, teacher: Path, tmp_path: Path
):
    """No figure and no default depends on what a teacher is called."""
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    shutil.copytree(teacher, elsewhere)
    shutil.copytree(trained, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    fewer = {"report_teacher_steps": [1], "report_steps": [2], "report_prompts": ["embedded:emoji"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config | fewer | {"teacher": str(elsewhere)}))
    again = report_run(run)["rows"]
    assert [(row["role"], row["steps"]) for row in again] == [ROWS[0], ROWS[2], ROWS[4]]
    for row, same in zip(report["rows"][::2], again, strict=True):
        apart = {"source", "seconds_per_image"}
        assert {k: v for k, v in row.items() if k not in apart} == {k: v for k, v in same.items() if k not in apart}


def test_the_picture_shows_the_first_images_of_every_row(trained: Path):
    """64 pixels become 128, each a square of four; the label stands before them."""
    import numpy as np

    picture = Image.open(trained / PICTURE)
    pixels = np.asarray(picture)
    sheet = cut(Image.open(trained / SHEETS / "4-student-2-steps.png"), 8, 64, 64)
    side, gap, label = 128, 6, 190
    assert picture.width == label + 8 * (side + gap) + gap
    top = picture.height - gap - (side + gap)
    for i in range(8):
        left = label + i * (side + gap)
        shown = pixels[top : top + side : 2, left : left + side : 2]
        assert (shown == sheet[i].permute(1, 2, 0).numpy()).all()


def test_the_table_holds_every_figure(report: dict, trained: Path):
    text = (trained / "report.md").read_text()
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")][: 2 + len(ROWS)]
    assert [part.strip() for part in head.split("|")[1:-1]] == ["row", "NFE", "s/image", *EMOJI]
    for line, row in zip(lines, report["rows"], strict=True):
        figures = [part.strip() for part in line.split("|")[4:-1]]
        assert figures == [cell(f["value"], f["stderr"]) for f in row["metrics"].values()]


def test_a_finished_run_is_reported_anew_with_other_settings(config: Path, trained: Path, tmp_path: Path, fewstep):
    shutil.copytree(trained, tmp_path / "tiny")
    before = (tmp_path / "tiny" / "report.json").stat().st_mtime_ns
    less = ("report_teacher_steps=[1]", "report_prompts=[embedded:emoji]")
    for n, told, anew in ((8, (), False), (4, less, True), (4, (*less, "report_steps=[2]"), True)):
        answer = fewstep("train", config, f"output_dir={tmp_path}", f"report_num={n}", *told, "--resume")
        assert answer.code == 0, answer.err
        report = tmp_path / "tiny" / "report.json"
        assert json.loads(report.read_text())["n"] == n
        assert (report.stat().st_mtime_ns > before) == anew
        before = report.stat().st_mtime_ns
    rows = json.loads(report.read_text())["rows"]
    assert [row["steps"] for row in rows if row["role"] == "student"] == [2]
