"""A LoRA of any origin on the command line: with its scheduler and its timesteps, beside the pipeline that it is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.distill.evaluation import Teacher
from tests.app.conftest import Answer

Command = Callable[..., Answer]


@pytest.fixture
def source(teacher: Path, trained: Path) -> str:
    return f"{teacher}+{trained / 'student' / 'pytorch_lora_weights.safetensors'}"


def test_sample_takes_its_scheduler_and_timesteps(fewstep: Command, source: str, tmp_path: Path):
    """The pixels of the stock call."""
    out = tmp_path / "cat.png"
    own = ("--scheduler", "lcm", "--timesteps", "999,499", "--guidance-scale", 1)
    answer = fewstep("sample", source, "-p", "a cat", "-n", 1, *own, "--out", out)
    assert (answer.code, answer.out) == (0, f"{out}: 1 image in 2 steps\n")
    (image,) = Teacher(source).sampler(2, 1.0, "lcm", timesteps=[999, 499]).images(["a cat"], [0])
    pixels = torch.frombuffer(bytearray(Image.open(out).tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels, (image * 255).round().to(torch.uint8).permute(1, 2, 0).flatten())
    answer = fewstep("sample", source, "-p", "a cat", "--steps", 4, *own, "--out", out)
    assert (answer.code, answer.err) == (2, "timesteps 999,499: 2 of them for 4 steps\n")


def test_a_student_of_ours_has_its_own_steps(fewstep: Command, trained: Path, tmp_path: Path):
    answer = fewstep("sample", trained, "-p", "a cat", "--timesteps", "999,499", "--out", tmp_path / "x.png")
    assert answer.code == 2
    assert "is a student, which samples by its own plan; leave it out" in answer.err


def test_evaluate_puts_it_beside_its_teacher(fewstep: Command, teacher: Path, source: str, tmp_path: Path):
    """What is said of the LoRA's sampling is not the teacher's, nor that of the target that both are compared with."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("a cat\na dog")
    own = ("--scheduler", "lcm", "--timesteps", "999,499", "--guidance-scale", 1)
    shared = ("--steps", 2, "--teacher-steps", 3, "-n", 4, "--prompts", prompts, "--out", out)
    answer = fewstep("evaluate", source, teacher, *own, *shared)
    assert answer.code == 0, answer.err
    rows = [(r["source"], r["steps"], r["scheduler"], r["guidance"]) for r in json.loads(out.read_text())["rows"]]
    assert rows == [
        (str(teacher), 3, "dpmsolver++ (trailing)", 7.5),
        (source, 2, "lcm (999,499)", 1.0),
        (str(teacher), 2, "dpmsolver++ (trailing)", 7.5),
    ]
    answer = fewstep("evaluate", source, *own, "--steps", "1,2", "--prompts", prompts, "--out", out)
    assert (answer.code, answer.err) == (2, "--timesteps: 2 of them for --steps 1,2\n")
