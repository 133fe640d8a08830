"""What others published, on the command line: a LoRA with its scheduler and timesteps, a checkpoint in one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.app.sources import check, load_source
from fewstep.distill.evaluation import Teacher
from tests.app.conftest import Answer
from tests.pipelines import tiny_stable_diffusion
from tests.samplers.original import publish

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
    drawn = []
    for extra in ([], ["--eta", 0.3], ["--eta", 0.3, "--dtype", "bf16"]):
        answer = fewstep("sample", source, "-p", "a cat", "-n", 1, "--scheduler", "tcd", *extra, "--out", out)
        assert answer.code == 0, answer.err
        drawn.append(torch.frombuffer(bytearray(Image.open(out).tobytes()), dtype=torch.uint8).float())
    assert (drawn[0] - drawn[1]).abs().max() > 1
    assert 0 < (drawn[1] - drawn[2]).abs().mean() < 10


def test_a_student_of_ours_has_its_own_steps(fewstep: Command, trained: Path, tmp_path: Path):
    answer = fewstep("sample", trained, "-p", "a cat", "--timesteps", "999,499", "--out", tmp_path / "x.png")
    assert answer.code == 2
    assert "is a student, which samples by its own plan; leave it out" in answer.err
    answer = fewstep("sample", trained, "-p", "a cat", "--eta", 0.3, "--out", tmp_path / "x.png")
    assert answer.code == 2
    assert answer.err.startswith("--eta 0.3: ")


def test_sample_takes_a_network_alone(fewstep: Command, teacher: Path, tmp_path: Path):
    """Its picture, and not the pipeline's."""
    weights = {k: 0.9 * v for k, v in tiny_stable_diffusion().unet.state_dict().items()}
    save_file(weights, tmp_path / "one_step_unet.safetensors")
    drawn = []
    for source in (f"{teacher}+{tmp_path / 'one_step_unet.safetensors'}", teacher):
        own = ("--scheduler", "lcm", "--timesteps", "800", "--guidance-scale", 1)
        answer = fewstep("sample", source, "-p", "a cat", "-n", 1, *own, "--out", tmp_path / "cat.png")
        assert answer.code == 0, answer.err
        drawn.append(Image.open(tmp_path / "cat.png").tobytes())
        (image,) = Teacher(str(source)).sampler(1, 1.0, "lcm", timesteps=[800]).images(["a cat"], [0])
        assert bytes((image * 255).round().to(torch.uint8).permute(1, 2, 0).flatten().tolist()) == drawn[-1]
    assert drawn[0] != drawn[1]


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


def test_a_single_file_teaches_and_is_sampled_evaluated_and_shown(
    fewstep: Command, config: Path, teacher: Path, tmp_path: Path
):
    """As its folder is, whose weights it has: the same pixels."""
    file = publish(tiny_stable_diffusion(), tmp_path)
    small = (
        "max_train_steps=1",
        "report_num=null",
        f"output_dir={tmp_path}",
        "validation_prompts=[a cat]",
        "validation_guidance_scale=1",
        "preflight=false",
        "steps=[2]",
    )
    assert "GiB" in fewstep("train", config, f"teacher={file}", *small, "--plan").out
    answer = fewstep("train", config, f"teacher={file}", *small)
    assert answer.code == 0, answer.err
    run = tmp_path / "tiny"
    pictures = {}
    for name in (str(run), file, str(teacher)):
        out = tmp_path / f"{len(pictures)}.png"
        answer = fewstep("sample", name, "-p", "a cat", "-n", 1, "--steps", 2, "--out", out)
        assert answer.code == 0, answer.err
        pictures[name] = Image.open(out).tobytes()
    assert pictures[file] == pictures[str(teacher)]
    prompts, out = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("a cat\na dog")
    shared = ("--steps", 2, "--teacher-steps", 3, "-n", 4, "--prompts", prompts, "--out", out)
    answer = fewstep("evaluate", file, *shared)
    assert answer.code == 0, answer.err
    assert [r["source"] for r in json.loads(out.read_text())["rows"]] == [file, file]
    check([str(run), file])
    assert load_source(str(run)).teacher.source == file
    assert load_source(file).student is None
    answer = fewstep("sample", tmp_path / "x.ckpt", "-p", "a cat", "--out", tmp_path / "x.png")
    assert (answer.code, answer.err) == (
        2,
        f"{tmp_path / 'x.ckpt'}: a pickle, which can run any code when it is read; save its weights as .safetensors\n",
    )
