"""Methods on backbones that have few recipes, two iterations each: LoRA and full, to a student that loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distill import load_config, train
from fewstep.distill.config import ConfigError
from fewstep.distill.methods import why_not
from fewstep.samplers.denoisers.wan import Wan
from fewstep.samplers.load import load, load_student
from fewstep.samplers.manifest import base_parameters, fingerprint
from fewstep.samplers.plan import sample
from tests.distill.runs import metrics, write_images
from tests.pipelines import tiny_classes, tiny_dit, tiny_pixart, tiny_wan

TINY: dict[str, tuple[Callable[..., Any], tuple[str, str]]] = {  # with two prompts
    "ConsistencyModelPipeline": (tiny_classes, ("0", "3")),
    "DiTPipeline": (tiny_dit, ("golden retriever", "7")),
    "PixArtAlphaPipeline": (tiny_pixart, ("a red apple", "a cat")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a teacher, pictures of 16 or 8 pixels with captions, and prompts; made once."""
    home = tmp_path_factory.mktemp("teachers")

    def folder(name: str) -> Path:
        build, prompts = TINY[name]
        path = home / name
        if not path.is_dir():
            build(path / "teacher")
            write_images(path / "images", n=2)
            for i, prompt in enumerate(prompts):
                (path / "images" / f"{i}.txt").write_text(prompt)
            (path / "prompts.txt").write_text("\n".join(prompts))
        return path

    return folder


@pytest.mark.parametrize("student", ["lora", "full"])
@pytest.mark.parametrize("method", ["lcm", "dmd2"])
@pytest.mark.parametrize("name", TINY)
def test_a_method_trains_a_backbone(name: str, method: str, student: str, made: Callable[[str], Path], tmp_path: Path):
    """Every role has a loss; the student moved from its teacher, samples as labelled, and says what it is."""
    folder, prompts = made(name), list(TINY[name][1])
    own = {  # the student's first step of dmd2 is nothing where fake score and teacher are still the same
        "lcm": (f"train_data={folder / 'images'}",),
        "dmd2": (f"prompts={folder / 'prompts.txt'}", "fake_score_updates=1"),
    }
    run = train(
        load_config(
            {"method": method, "teacher": str(folder / "teacher"), "student": student},
            [
                *(*own[method], f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "steps=[2]", "rank=2"),
                *("max_train_steps=2", "train_batch_size=2", "logging_steps=1", "learning_rate=0.01"),
                *(f"validation_prompts=[{', '.join(repr(p) for p in prompts)}]", "guidance_scale=3"),
                # one of the runs of a teacher is enough, and a preview has twenty steps of it
                *(f"preflight={str((method, student) == ('lcm', 'lora')).lower()}", "validation_guidance_scale=1"),
            ],
        )
    )
    roles = {"student"} if method == "lcm" else {"student", "fake_score"}
    first, second = metrics(run)
    assert {key for key in first if key.endswith("/loss")} == {f"{role}/loss" for role in roles}
    assert second["iteration"] == 2
    teacher = load(folder / "teacher")
    loaded, manifest = load_student(run)
    assert (manifest.pipeline, manifest.kind, manifest.method) == (name, student, method)
    assert manifest.fingerprint == fingerprint(teacher)
    before, after = (base_parameters(d.network) for d in (teacher, loaded))
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    adapted = {k for k in before if k.removesuffix(".weight").endswith(tuple(f".{e}" for e in teacher.lora_targets))}
    assert changed
    assert student == "full" or changed <= adapted
    latents = sample(loaded, loaded.encode(prompts), manifest.plan(2), [0, 1])
    swapped = sample(loaded, loaded.encode(prompts[::-1]), manifest.plan(2), [0, 1])
    assert (latents - swapped).norm() > 1e-3 * latents.norm()
    assert all(f"{prompt}" in (run / "student/README.md").read_text() for prompt in prompts)


def test_clips_cannot_be_learnt_from_images(tmp_path: Path):
    """Refused before a weight loads, in the words of `fewstep backbones`."""
    tiny_wan(tmp_path / "teacher")
    for weights in (tmp_path / "teacher").rglob("*.safetensors"):
        weights.unlink()
    config = {"method": "lcm", "teacher": str(tmp_path / "teacher"), "output_dir": str(tmp_path), "train_data": "."}
    with pytest.raises(ConfigError, match="method lcm: needs clips for this teacher, and train_data has images only"):
        train(load_config(config))
    of_prompts = config | {"method": "dmd2", "prompts": "."}
    assert why_not(load_config(of_prompts), Wan) is None
    assert "needs clips" in str(why_not(load_config(of_prompts | {"gan_weight": 1.0e-3}), Wan))
