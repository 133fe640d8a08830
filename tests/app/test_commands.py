"""Sampling, evaluating and exporting a trained student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

from fewstep.app.sample import save_clips
from fewstep.distill import picture
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import load, load_student
from tests.app.conftest import Answer
from tests.app.test_clips import frames

Command = Callable[..., Answer]
PROMPTS = ("a fruit on a blue background", "a bird on a red background")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_sample_is_the_students_plan(fewstep: Command, trained: Path, tmp_path: Path):
    """A row for each prompt, image j from seed + j, whatever the batch."""
    from fewstep.samplers.plan import sample

    (tmp_path / "prompts.txt").write_text(PROMPTS[1])
    out = tmp_path / "new" / "a.png"
    answer = fewstep(
        *("sample", trained, "-p", PROMPTS[0], "--prompts", tmp_path / "prompts.txt"),
        *("--steps", 2, "-n", 3, "--seed", 7, "--out", out),
    )
    assert (answer.code, answer.out) == (0, f"{out}: 6 images in 2 steps\n")
    student, manifest = load_student(trained)
    condition = student.encode([p for p in PROMPTS for _ in range(3)])
    shape = student.latent_shape(64, 64)
    images = student.decode(sample(student, condition, manifest.plan(2), [7, 8, 9] * 2, shape))
    want = (images * 255).round().view(2, 3, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(128, 192, 3)
    assert np.abs(pixels(out) - want.numpy()).max() <= 1


def test_sample_of_a_teacher_is_its_stock_pipeline(fewstep: Command, teacher: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

    out = tmp_path / "a.png"
    command = ("sample", teacher, "-p", PROMPTS[0], "--steps", 3, "-n", 2, "--out", out)
    assert fewstep(*command, "--scheduler", "unipc", "--guidance-scale", 2).code == 0
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    images = pipe([PROMPTS[0]] * 2, num_inference_steps=3, guidance_scale=2, generator=generators, output_type="np")[0]
    assert np.abs(pixels(out) - np.rint(np.concatenate(list(images), 1) * 255)).max() <= 1


def test_sample_of_another_size_and_away_from_a_prompt(fewstep: Command, trained: Path, teacher: Path, tmp_path: Path):
    """As the stock pipeline's call with the same arguments; of a LoRA student, as in plain diffusers with its LoRA."""
    from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

    shared, size = ("-p", PROMPTS[0], "--seed", 1, "-n", 1, "--steps", 2), ("--height", 32, "--width", 96)
    out, given = tmp_path / "a.png", {"height": 32, "width": 96, "output_type": "np"}
    noise = torch.Generator().manual_seed(1)

    def same(pipe: Any, **arguments: Any) -> None:
        (image,) = pipe([PROMPTS[0]], num_inference_steps=2, generator=[noise.manual_seed(1)], **given, **arguments)[0]
        assert pixels(out).shape == (32, 96, 3)
        assert np.abs(pixels(out) - np.rint(image * 255)).max() <= 1

    away = ("--negative-prompt", PROMPTS[1], "--guidance-scale", 3, "--scheduler", "ddim")
    assert fewstep("sample", teacher, *shared, *size, *away, "--out", out).code == 0
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    same(pipe, guidance_scale=3, negative_prompt=[PROMPTS[1]])
    before = pixels(out)
    assert fewstep("sample", teacher, *shared, *size, *away[2:], "--out", out).code == 0
    assert np.abs(pixels(out) - before).max() > 1
    assert fewstep("sample", trained, *shared, *size, "--out", out).code == 0
    pipe.load_lora_weights(trained / "student", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = LCMScheduler.from_pretrained(trained / "student", subfolder="scheduler")
    same(pipe, guidance_scale=1)
    answer = fewstep("sample", teacher, *shared, *away[:2], "--guidance-scale", 1)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("--negative-prompt: only guidance by a second call leads away from one")


def test_clips_become_an_animation_or_rows_of_frames(tmp_path: Path):
    from fewstep.app.sample import grid, save_clips

    clips = torch.arange(2 * 3, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 3, 8, 8) * 40
    save_clips(clips, 2, tmp_path / "a.gif", 10)
    with Image.open(tmp_path / "a.gif") as animation:
        assert (animation.n_frames, animation.size, animation.info["duration"]) == (3, (16, 8), 100)
        animation.seek(2)
        assert [animation.convert("RGB").getpixel(p) for p in ((0, 0), (8, 0))] == [(80,) * 3, (200,) * 3]
    save_clips(clips, 1, tmp_path / "a.mp4", 10)  # one below the other
    meta, played = frames(tmp_path / "a.mp4")
    assert (meta["fps"], played.shape) == (10, (3, 16, 8, 3))
    assert np.abs(played[:, [0, 8], 0, 0] - [[0, 120], [40, 160], [80, 200]]).max() <= 4
    assert [grid(clips, 2).getpixel((8 * i, 8)) for i in range(3)] == [(120,) * 3, (160,) * 3, (200,) * 3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "x", "--scheduler", "ddim"], "is a student, which samples by its own plan; leave it out"),
        (["-p", "x", "--guidance-scale", "3"], "takes no guidance scale"),
        (["-p", "x", "--out", "a.txt"], "--out a.txt: must end in .png"),
        (["-p", "x", "--steps", "2", "--out", "a.mp4"], "makes images; name a .png"),
        ([], "no prompt: say -p PROMPT"),
        (["-p", "x", "--negative-prompt", "y"], "is a student, which samples by its own plan; leave it out"),
        (["-p", "x", "--steps", "2", "--num-frames", "5"], "StableDiffusionPipeline takes no num_frames"),
        (["-p", "x", "--steps", "2", "--height", "63"], "both must be divisible by"),
    ],
)
def test_sample_refuses_in_one_line(fewstep: Command, trained: Path, arguments: list[str], said: str):
    answer = fewstep("sample", trained, *arguments)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert said in answer.err


def test_sample_keeps_the_picture_that_was_there(fewstep: Command, teacher: Path, tmp_path: Path):
    """Where the new one cannot be written: WebP ends at 16383 pixels. Half a character is no prompt."""
    out = tmp_path / "w.webp"
    assert fewstep("sample", teacher, "-p", "a cat", "-n", 1, "--steps", 1, "--out", out).code == 0
    before = out.read_bytes()
    picture.save(Image.new("RGB", (16, 16)), tmp_path / "small.webp")
    with pytest.raises(UserError, match=r"w\.webp: cannot be written \("):
        picture.save(Image.new("RGB", (17000, 16)), out)
    for size, name in ((17000, "w.webp"), (70000, "w.gif")):
        with pytest.raises(UserError, match="cannot be written"):
            save_clips(torch.zeros(1, 2, 3, 1, size, dtype=torch.uint8), 1, tmp_path / name, 16)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.webp", "w.webp"]
    answer = fewstep("sample", teacher, "-p", "caf\udce9", "--steps", 1, "--out", out)
    assert (answer.code, answer.err) == (2, "prompt: 'caf\\udce9' is no valid Unicode, at character 4\n")
    answer = fewstep("sample", "x" * 300, "-p", "a cat")
    assert (answer.code, answer.err) == (2, f"{'x' * 200}: File name too long\n")


def test_sample_refuses_an_unknown_scheduler(fewstep: Command, teacher: Path):
    answer = fewstep("sample", teacher, "-p", "x", "--scheduler", "dpm")
    assert (answer.code, answer.err) == (
        2,
        "scheduler 'dpm' is unknown; allowed: own, ddim, dpmsolver++, euler, lcm, tcd, unipc\n",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "60", "--scheduler", "lcm"], "60 steps: "),
        (
            ["--steps", "2", "--scheduler", "lcm", "--timesteps", "249,999"],
            "timesteps 249,999: must fall, from at most 999",
        ),
        (["--steps", "2000", "--scheduler", "ddim"], "2000 steps: `num_inference_steps`: 2000 cannot be larger than"),
        (["--seed", str(2**64)], "Invalid value for '--seed': Input should be less"),
    ],
)
def test_sample_refuses_what_a_scheduler_does_not_take(
    fewstep: Command, teacher: Path, arguments: list[str], said: str
):
    answer = fewstep("sample", teacher, "-p", "x", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err


def test_evaluate_compares_with_the_many_step_picture_of_the_same_noise(
    fewstep: Command, trained: Path, teacher: Path, tmp_path: Path
):
    """The teacher in as many steps as the target is the target: no image differs by more than a grey level or two."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "new" / "report.json"
    prompts.write_text("\n".join(PROMPTS))
    answer = fewstep(
        *("evaluate", teacher, "--steps", "1,6", "--teacher-steps", 6, "--num", 6, "--prompts", prompts),
        *("--guidance-scale", 1, "--out", out, "--batch-size", 4),
    )
    assert answer.code == 0
    report = json.loads(out.read_text())
    target, six, one = report["rows"]
    assert target["metrics"].keys() == {"pixel_distance"}
    assert six["metrics"]["psnr_to_teacher"]["value"] > 50 > 40 > one["metrics"]["psnr_to_teacher"]["value"]
    assert (six["nfe"], one["nfe"], six["scheduler"], six["guidance"]) == (6, 1, "dpmsolver++ (trailing)", 1)
    assert out.with_suffix(".md").read_text() in answer.out
    assert out.with_suffix(".png").is_file()


def test_evaluate_compares_with_the_teacher_of_the_run(fewstep: Command, trained: Path, tmp_path: Path):
    """With the run's negative prompt and guidance, and in another precision where that is asked for: other images."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    shared = ("--steps", 2, "--teacher-steps", 2, "-n", 4, "--prompts", prompts, "--guidance-scale", 5)
    distances = {}
    for name, negative, more in (("none", "", ()), ("dog", "a dog", ()), ("low", "", ("--dtype", "bf16"))):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"negative_prompt": negative}))
        answer = fewstep("evaluate", run, *shared, *more, "--out", out := tmp_path / "report.json")
        assert answer.code == 0, answer.err
        report = json.loads(out.read_text())
        target, row = report["rows"]
        assert target["role"] == "teacher"
        assert report.get("dtype") == ("bf16" if name == "low" else None)
        distances[name] = row["metrics"]["psnr_to_teacher"]["value"]
    assert (
        len(list(out.with_suffix(".images").glob("*/2-steps-*"))) == 5
    )  # the student's is the same with a negative prompt
    assert abs(distances["none"] - distances["dog"]) > 1e-3
    assert distances["low"] == pytest.approx(distances["none"], abs=1.5)
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"validation_guidance_scale": 3.5}))
    answer = fewstep("evaluate", run, config["teacher"], *shared[:-2], "--out", out)
    assert answer.code == 0, answer.err
    assert {row["guidance"] for row in json.loads(out.read_text())["rows"] if row["role"] == "teacher"} == {3.5}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ("fidd", "metric fidd: unknown; did you mean fid? known: fid,"),
        ("coverage", "metric coverage: needs the embedded prompts"),
    ],
)
def test_evaluate_refuses_figures_that_it_has_not(
    fewstep: Command, trained: Path, tmp_path: Path, metrics: str, said: str
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    answer = fewstep("evaluate", trained, "--steps", 2, "--metrics", metrics, "--prompts", prompts)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert said in answer.err


def latents(student: object) -> torch.Tensor:
    """The network's prediction on fixed input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    hidden = torch.randn(1, 16, 16, generator=generator)
    with torch.no_grad():
        return student.pipeline.unet(x, 500, encoder_hidden_states=hidden).sample  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def moved(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with an adapter that is far from nothing, as two iterations leave it near to."""
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(trained / "student", tmp_path_factory.mktemp("moved") / "student"))
    path = folder / "pytorch_lora_weights.safetensors"
    generator = torch.Generator().manual_seed(0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  not a dict
    moved = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(moved, path, metadata)
    return folder


def test_exports_say_what_the_student_says(fewstep: Command, moved: Path, teacher: Path, tmp_path: Path):
    from peft import PeftModel

    student, manifest = load_student(moved)
    want, far = latents(student), latents(load(teacher))
    assert (want - far).norm() > 0.01 * far.norm()
    for kind in ("diffusers", "fused", "peft"):
        answer = fewstep("export", moved, tmp_path / kind, "--format", kind)
        assert (answer.code, answer.err) == (0, "")
        assert str(tmp_path / kind) in answer.out

    again, same = load_student(tmp_path / "diffusers")
    assert same == manifest
    assert torch.equal(latents(again), want)

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert not any("lora" in k or "base_layer" in k for k in pipe.unet.state_dict())
    assert (
        type(pipe.scheduler).__name__
        == json.loads((moved / "scheduler/scheduler_config.json").read_text())["_class_name"]
    )
    torch.testing.assert_close(latents(load(tmp_path / "fused")), want, atol=1e-4, rtol=1e-4)
    _, declared = load_student(tmp_path / "fused")
    assert declared.plans == manifest.plans

    other = load(teacher)
    other.pipeline.unet = PeftModel.from_pretrained(other.pipeline.unet, tmp_path / "peft")
    torch.testing.assert_close(latents(other), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["diffusers", "peft"])
def test_an_export_that_fails_leaves_nothing(
    fewstep: Command, trained: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """A disk that is full in the middle: the same command works once there is room."""
    import shutil

    from fewstep.app import export

    def full(folder: Path, out: Path, *rest: object, **more: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "half").write_text("")
        if kind == "peft":
            raise SafetensorError("Error while serializing: No space left on device")
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])

    if kind == "peft":
        monkeypatch.setattr(export, "save_peft", lambda out, *rest: full(trained, out))
    else:
        monkeypatch.setattr(shutil, "copytree", full)
    answer = fewstep("export", trained, tmp_path / "out", "--format", kind)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert "out: cannot be written (" in answer.err
    assert "No space left on device" in answer.err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert fewstep("export", trained, tmp_path / "out", "--format", kind).code == 0
    monkeypatch.chdir(tmp_path / "out")
    assert ".: exists already; name a new folder" in fewstep("export", trained, ".", "--format", kind).err


def test_export_refuses_in_one_line(fewstep: Command, trained: Path, teacher: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for arguments, said in (
        ((trained, tmp_path / "new", "--format", "onnx"), "--format onnx: unknown; allowed: diffusers, fused, peft"),
        ((teacher, tmp_path / "new"), "neither a run nor a student's folder"),
        ((trained, tmp_path / "full"), "exists already; name a new folder"),
    ):
        answer = fewstep("export", *arguments)
        assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
        assert said in answer.err
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
