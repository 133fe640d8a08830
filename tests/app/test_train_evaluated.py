"""`fewstep train` with figures while it trains: whole runs, one of them in two parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.app.conftest import Answer, reset, run
from tests.distill.runs import metrics
from tests.metrics.tiny_clip import noise_images, save_tiny_clip

FIGURES = ("clip", "fd_clip", "vendi", "pixel_distance")
PROMPTS = "a cat\na dog\na red apple"


class Runs:
    """One config, and runs of it."""

    def __init__(self, folder: Path, teacher: Path):
        self.folder, self.clip = folder, save_tiny_clip(folder / "clip", seed=3)
        self.prompts, self.reference = folder / "prompts.txt", folder / "reference"
        self.prompts.write_text(PROMPTS)
        self.reference.mkdir()
        for i, image in enumerate(noise_images(8, 64, 64)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(self.reference / f"{i}.png")
        self.values = {
            **{
                "method": "dmd2",
                "fake_score_updates": 1,
                "teacher": str(teacher),
                "prompts": str(self.prompts),
                "steps": [1, 2],
                "rank": 2,
            },
            **{"train_batch_size": 4, "learning_rate": 0.02, "height": 64, "width": 64, "max_train_steps": 3},
            **{"output_dir": str(folder / "runs"), "cache_dir": str(folder / "cache"), "report_num": None},
            **{"checkpointing_steps": 100, "checkpoints_total_limit": 1, "logging_steps": 100, "preflight": False},
            **{"eval_steps": 1, "eval_metrics": list(FIGURES), "eval_num": 6, "eval_reference": str(self.reference)},
            **{"eval_weights": {"clip_model": str(self.clip)}, "best_metric": "eval/fd_clip"},
        }

    def train(self, name: str, *more: str, **changes: Any) -> Answer:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.values | {"name": name} | changes))
        answer = run("train", path, *more)
        reset()
        return answer

    def evaluate(self, source: Path, out: Path) -> dict[str, float]:
        """Figures of one step by the command."""
        answer = run(
            *("evaluate", source, "--steps", 1, "-n", 6, "--prompts", self.prompts, "--metrics", ",".join(FIGURES)),
            *("--clip-model", self.clip, "--reference", self.reference, "--out", out),
        )
        assert answer.code == 0, answer.err
        (row,) = json.loads(out.read_text())["rows"]
        return {name: figure["value"] for name, figure in row["metrics"].items()}


@pytest.fixture(scope="module")
def runs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("evaluated"), teacher)


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Path:
    answer = runs.train("straight")
    assert answer.code == 0, answer.err
    return runs.folder / "runs" / "straight"


def without_seconds(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(folder)]


def test_figures_are_logged_and_are_those_of_the_command(runs: Runs, straight: Path, tmp_path: Path):
    """After the last iteration they are what `fewstep evaluate` says of the student that was saved, but for the levels that
    some pixels move by, since there the LoRA is added into the weights.
    """
    lines = metrics(straight)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert len({line["eval/fd_clip"] for line in lines}) == 3  # the student moved
    found = runs.evaluate(straight, tmp_path / "report.json")
    assert {name: lines[-1][f"eval/{name}"] for name in FIGURES} == pytest.approx(found, rel=5e-3)


def test_the_best_checkpoint_is_kept(straight: Path):
    """Beside the newest; the others made way."""
    best = min(metrics(straight), key=lambda line: line["eval/fd_clip"])["iteration"]
    kept = sorted(p.name for p in (straight / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best:06d}", "step-000003"})


def test_a_run_in_two_parts_logs_and_keeps_the_same(runs: Runs, straight: Path):
    """The best of the first part is remembered in the second."""
    assert runs.train("parts", max_train_steps=1).code == 0
    again = runs.train("parts", "--resume")
    assert (again.code, "at iteration 1" in again.err) == (0, True), again.err
    folder = straight.with_name("parts")
    assert without_seconds(folder) == without_seconds(straight)
    kept = [sorted(p.name for p in (f / "checkpoints").glob("step-*")) for f in (folder, straight)]
    assert kept[0] == kept[1]
    states = [(f / "checkpoints/step-000003/manifest.json").read_text() for f in (folder, straight)]
    assert states[0] == states[1]


def test_missing_weights_are_a_line_before_anything_is_trained(runs: Runs):
    answer = runs.train("bad", eval_metrics=["fid"], best_metric=None, eval_weights={"inception_weights": "no.pth"})
    *_, line = answer.err.splitlines()
    assert answer.code == 2
    assert "no.pth: no such file of Inception weights" in line
    assert line.endswith("(here: eval_weights: inception_weights FILE)")
    assert not (runs.folder / "runs/bad/metrics.jsonl").exists()
