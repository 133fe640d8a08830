"""A method outside of the package: two entries of two tables, and all else is as of any method."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fewstep.app.sample import sampler_of
from fewstep.app.sources import load_source as playground_source
from fewstep.distill.config import METHODS
from fewstep.distill.methods import DISTILLERS
from fewstep.samplers.load import load_student
from tests.distill.runs import metrics, write_images
from tests.pipelines import tiny_stable_diffusion


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_example_trains_exports_and_samples(
    scale: float, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At first the student says what the teacher does without guidance: the loss is 0 at scale 1 alone."""
    for table in (METHODS, DISTILLERS):
        monkeypatch.setitem(table, "guided", table["lcm"])  # the example's entries go with the test
    tiny_stable_diffusion(tmp_path / "teacher")
    argv = [
        "example",
        f"teacher={tmp_path / 'teacher'}",
        f"train_data={write_images(tmp_path / 'images', n=2, side=64)}",
    ]
    argv += [f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "preflight=false", "mixed_precision=no"]
    argv += ["max_train_steps=2", "train_batch_size=2", "logging_steps=1", f"guidance_scale={scale}"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(root / "examples" / "own_method.py"), run_name="__main__")
    assert ended.value.code == 0
    run = tmp_path / "guided-sd15"
    first = metrics(run)[0]["student/loss"]
    assert first < 1e-10 if scale == 1 else first > 1e-3
    assert playground_source(str(run)).guidance_scale == scale
    _, manifest = load_student(run)
    assert (manifest.method, sorted(manifest.plans)) == ("guided", [20, 50])
    assert {step.guidance_scale for step in manifest.plan(20).steps} == {1.0}
    assert sampler_of(str(run), 20, None, None).images(["a cat"], [0]).shape == (1, 3, 16, 16)
