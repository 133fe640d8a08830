"""Rows: who samples, what it costs, which figures apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.distill.evaluation import (
    Teacher,
    default_metrics,
    draw,
    figures,
    student_sampler,
)
from fewstep.distill.metric_names import BASIC, EMOJI
from fewstep.distill.prompt_sets import prompt_set
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.manifest import Manifest
from fewstep.samplers.plan import sample, uniform_plan
from tests.pipelines import tiny_stable_diffusion

PROMPTS = prompt_set(["a cat", "a dog", "a red apple"], 6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_stable_diffusion(folder)
    return Teacher(str(folder))


def manifest(**changes: object) -> Manifest:
    base = {
        "base": "x",
        "pipeline": "StableDiffusionPipeline",
        "fingerprint": "0" * 16 + "-" + "A" * 342 + "==",
        "method": "lcm",
        "kind": "full",
    }
    return Manifest.model_validate(base | changes)


def test_a_teachers_defaults_are_its_pipelines_guidance_and_the_best_solver(teacher: Teacher):
    sampler = teacher.sampler(4)
    assert (sampler.guidance, sampler.scheduler) == (7.5, "dpmsolver++ (trailing)")
    own = teacher.sampler(4, scheduler="own", spacing="leading")
    assert own.scheduler == "DDIM (leading)"
    with pytest.raises(UserError, match="steps 0: must be at least 1"):
        teacher.sampler(0)


def test_samplers_of_one_pipeline_do_not_disturb_each_other(teacher: Teacher):
    """They share its scheduler attribute."""
    first, second = teacher.sampler(3, 2.0, "unipc"), teacher.sampler(3, 2.0, "ddim")
    want = first.images(["a cat"], [0])
    other = second.images(["a cat"], [0])
    assert torch.equal(first.images(["a cat"], [0]), want)
    assert not torch.equal(other, want)


def test_a_row_is_every_prompt_once_with_its_own_seed_and_cost(teacher: Teacher):
    told: list[int] = []
    drawn = draw(teacher.sampler(3, 2.0), PROMPTS, 4, told.append)
    assert (drawn.nfe, told) == (6, [4, 2])  # the image drawn before to warm up does not count
    assert drawn.seconds_per_image > 0
    last = teacher.sampler(3, 2.0).images(PROMPTS.prompts[5:], PROMPTS.seeds[5:])
    assert (drawn.images[5].float() - 255 * last[0]).abs().max() < 0.6


def test_a_student_with_a_guidance_input_takes_another_scale():
    denoiser = denoiser_of(tiny_stable_diffusion(guidance_input=True))
    plan = uniform_plan(2, rule="consistency", embedded_guidance=4.0)
    own = student_sampler(denoiser, manifest(plans={2: plan}), "student", 2)
    other = student_sampler(denoiser, manifest(plans={2: plan}), "student", 2, 9.0)
    assert (own.guidance, other.guidance, own.scheduler) == (4, 9, "consistency")
    want = plan.model_copy(update={"embedded_guidance": 9.0})
    condition = denoiser.encode(["a cat"])
    images = denoiser.decode(sample(denoiser, condition, want, [3]))
    assert torch.equal(other.images(["a cat"], [3]), images)
    assert not torch.allclose(own.images(["a cat"], [3]), images, atol=1e-3)
    fixed = manifest(plans={2: uniform_plan(2)})
    with pytest.raises(UserError, match="student: the student takes no guidance scale"):
        student_sampler(denoiser, fixed, "student", 2, 9.0)


def test_figures_follow_the_prompts():
    emoji = prompt_set("embedded:emoji", 6)
    assert (default_metrics(emoji), default_metrics(PROMPTS)) == (EMOJI, BASIC)


def test_basic_figures_of_a_row():
    """Six images of three prompts, two each, in turn: the pairs are (0, 3), (1, 4), (2, 5)."""
    levels = torch.tensor([0, 10, 20, 6, 10, 20], dtype=torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    found = figures(images, PROMPTS, BASIC, many=images + 1)
    assert list(found) == list(BASIC)
    assert found["psnr_to_teacher"][0] == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    assert found["pixel_distance"][0] == pytest.approx(2)
    assert list(figures(images, PROMPTS, BASIC)) == ["pixel_distance"]


def test_images_that_the_judge_cannot_see_are_refused_after_one(teacher: Teacher):
    emoji = prompt_set("embedded:emoji", 6)
    told: list[int] = []
    with pytest.raises(UserError, match="embedded:emoji: judged by images of 64x64 pixels; these are images of 16x16"):
        draw(teacher.sampler(1), emoji, 4, told.append, torch.zeros(6, 3, 64, 64, dtype=torch.uint8))
    assert not told


def test_a_source_is_a_student_where_a_manifest_lies(tmp_path: Path):
    from fewstep.distill.evaluation import student_folder

    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "student" / "fewstep.json").write_text("{}")
    assert student_folder(run) == student_folder(run / "student") == run / "student"
    assert student_folder(tmp_path) is None
