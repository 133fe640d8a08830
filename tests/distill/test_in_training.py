"""Figures while a student trains: those of its images on fixed noise, logged, and the best checkpoint by one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.distill.config import ConfigError, validate
from fewstep.distill.in_training import InTraining, steps_of
from fewstep.distill.prompt_sets import prompt_set
from fewstep.metrics.pixels import mean_distance
from fewstep.samplers.condition import Condition
from fewstep.samplers.manifest import fingerprint_of
from fewstep.samplers.plan import uniform_plan
from tests.distill.runs import Scripted, config, metrics, scripted, square


def judged(folder: Path, values: Sequence[float], **changes: Any) -> list[dict[str, float]]:
    """A run of six iterations whose figure takes these values, one after another; lines of its log."""
    made = scripted(folder, Scripted({"student": square}), **changes)
    left = iter(values)
    name = changes["eval_metrics"][0]
    made.judge = lambda student: {f"eval/{name}": next(left)}
    made.run()
    assert next(left, None) is None
    return metrics(folder / "run")


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("name", "values", "kept"), [("pixel_distance", [1.0, 9.0, 5.0], 4), ("fd_emoji", [1.0, 9.0, 5.0], 2)]
)
def test_the_best_checkpoint_by_a_figure_is_kept(tmp_path: Path, name: str, values: list[float], kept: int):
    """Higher is better of a score, lower of a distance. Figures every two iterations make checkpoints of their own."""
    changes = {"eval_steps": 2, "eval_metrics": [name], "best_metric": f"eval/{name}", "checkpointing_steps": 100}
    lines = judged(tmp_path, values, checkpoints_total_limit=1, **changes)
    assert [line["iteration"] for line in lines if f"eval/{name}" in line] == [2, 4, 6]
    assert [lines[i][f"eval/{name}"] for i in (1, 3, 5)] == values
    assert checkpoints(tmp_path) == sorted({f"step-{kept:06d}", "step-000006"})


def test_a_checkpoint_between_is_not_credited_with_an_earlier_figure(tmp_path: Path):
    """Figures at iterations 3 and 6, checkpoints at 2, 3, 4 and 6: of these only 3 and 6 may be the best."""
    changes = {"eval_steps": 3, "eval_metrics": ["motion"], "best_metric": "eval/motion", "checkpointing_steps": 2}
    judged(tmp_path, [5.0, 1.0], checkpoints_total_limit=1, **changes)
    assert checkpoints(tmp_path) == ["step-000003", "step-000006"]


def test_figures_and_previews_are_of_the_moving_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As is what is exported: three figures and two previews of six iterations, while other weights train."""
    made, seen = Scripted({"student": square}), list[bool]()
    changes = {"ema_decay": 0.9, "eval_steps": 2, "eval_metrics": ["motion"], "validation_steps": 2}
    run = scripted(tmp_path, made, validation_prompts=["a cat"], **changes)

    def is_average() -> bool:
        assert run.average is not None
        return torch.equal(made.weights["student"], run.average["w"])

    run.judge = lambda student: seen.append(is_average()) or {"eval/motion": 1.0}
    monkeypatch.setattr(run.record, "preview", lambda *_: seen.append(is_average()))
    run.run()
    assert seen == [True] * 5
    assert not is_average()


def test_a_run_ends_after_figures_that_are_no_better(tmp_path: Path):
    """The best at iteration 2, two no better after it: iteration 4 is the last of six, and a resume adds none."""
    changes = {"eval_steps": 1, "eval_metrics": ["motion"], "best_metric": "eval/motion", "early_stopping_patience": 2}
    lines = judged(tmp_path, [5.0, 9.0, 9.0, 8.0], **changes)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    again = scripted(tmp_path, Scripted({"student": square}), resume=True, **changes)
    assert again.iteration == 4
    again.run()
    assert again.iteration == 4
    assert not again.record.finished()
    (tmp_path / "run" / "student").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "run" / "student" / "w.safetensors")
    mark, plans = fingerprint_of({"w": torch.nn.Linear(1, 1)}), {1: uniform_plan(1).model_dump()}
    said = {"base": "b", "pipeline": "P", "fingerprint": mark, "method": "dmd2", "kind": "full", "plans": plans}
    for made, finished in ((3, False), (4, True)):
        (tmp_path / "run" / "student" / "fewstep.json").write_text(json.dumps(said | {"iteration": made}))
        assert again.record.finished() is finished
    for changed in ({"early_stopping_patience": None}, {"early_stopping_patience": 3}):
        longer = scripted(tmp_path, Scripted({"student": square}), resume=True, **changes | changed)
        assert not longer.record.finished()
        assert not longer.worn_out  # what stopped it is no longer asked for


def test_only_who_draws_decides_that_a_run_ends(tmp_path: Path):
    """Another process has the best of the checkpoint that it went on from, and never a newer one."""
    changes = {"eval_steps": 1, "eval_metrics": ["motion"], "best_metric": "eval/motion", "early_stopping_patience": 2}
    judged(tmp_path, [5.0, 6.0], max_train_steps=2, **changes)
    other = scripted(tmp_path, Scripted({"student": square}), resume=True, **changes)
    assert other.judge is None
    other.run()
    assert other.iteration == 6


class Student(SimpleNamespace):
    """Draws latents that depend on the noise alone, and shows them as grey levels."""

    device = torch.device("cpu")

    def decode(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()


def test_figures_are_those_of_the_students_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the batch; another call, as after a resume, gives the same."""
    rows = []

    def sample(student: Any, condition: Condition, plan: Any, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        rows.append(condition.tensors["c"].tolist())
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    monkeypatch.setattr("fewstep.distill.in_training.sample", sample)
    prompts = prompt_set(["a", "b"], 6)
    condition = Condition({"c": torch.arange(6)}, 6)
    want = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in prompts.seeds])
    for batch, split in ((4, [[0, 1, 2, 3], [4, 5]]), (6, [[0, 1, 2, 3, 4, 5]])):
        rows.clear()
        made = config(tmp_path, eval_steps=1, eval_metrics=["pixel_distance"], train_batch_size=batch)
        figures = InTraining(made, prompts, condition, uniform_plan(1), (3, 4, 4))(Student())  # type: ignore[arg-type]
        assert rows == split
        value = mean_distance((want.sigmoid() * 255).round().to(torch.uint8), prompts.groups)[0]
        assert figures == {"eval/pixel_distance": pytest.approx(value, rel=1e-6)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_metrics": ["fidd"]}, "eval_metrics: metric fidd: unknown; did you mean fid?"),
        ({"eval_metrics": []}, "eval_metrics: name the figures that eval_steps asks for"),
        ({"eval_metrics": ["psnr_to_teacher"]}, "compares with the teacher's images, which only the report draws"),
        ({"eval_metrics": ["fid"]}, "eval_reference: metric fid needs a folder of images"),
        ({"eval_metrics": ["clip"], "best_metric": "eval/fid"}, "best_metric: needs eval_steps, and its figure among"),
        ({"eval_metrics": ["clip"], "eval_weights": {"clip": "x"}}, "eval_weights"),
        ({"eval_metrics": ["clip"], "early_stopping_patience": 2}, "early_stopping_patience: needs best_metric"),
    ],
)
def test_a_wrong_block_is_refused_before_anything_loads(changes: dict[str, Any], said: str):
    values = {"method": "dmd2", "teacher": "any", "prompts": "embedded:emoji", "eval_steps": 10}
    with pytest.raises(ConfigError) as error:
        validate(values | changes)
    assert said in str(error.value)


def test_steps_that_the_student_has_not_are_refused(tmp_path: Path):
    assert steps_of(config(tmp_path), (4, 2)) == 2
    with pytest.raises(
        ConfigError, match=r"eval_sampling_steps: 3 is not a step count of this student; it has \(2, 4\)"
    ):
        steps_of(config(tmp_path, eval_sampling_steps=3), (2, 4))
