"""The artifact: what a student's folder holds, that it loads, and that its model card's snippets run without fewstep."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fewstep.distill.networks import Networks
from fewstep.samplers.card import PROMPTS
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, denoiser_of, load, load_student
from fewstep.samplers.manifest import WEIGHTS, fingerprint_of, same_weights
from fewstep.samplers.plan import SamplingPlan, Step, plan_of_levels, sample, uniform_plan
from fewstep.samplers.student import Manifest, fingerprint, read_manifest, save_student
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan

CLIP = {"height": 64, "width": 64, "num_frames": 5}


def lcm(steps: int, guidance: float | None = None) -> SamplingPlan:
    """Levels of LCMScheduler's own grid of 50."""
    levels = [(50 - (i * 50) // steps) / 50 for i in range(steps)]
    return plan_of_levels(levels, rule="consistency", embedded_guidance=guidance)


def renoising(steps: int, guidance_scale: float = 1.0) -> SamplingPlan:
    return uniform_plan(steps, guidance_scale, rule="consistency")


def two_scales(_: int) -> SamplingPlan:
    """Levels on both sides of Wan 2.2's boundary, which is at .9 after a shift by 3, each with its own guidance."""
    steps = [(1, 0.8, 3.0), (0.8, 0.4, 3.0), (0.4, 0, 2.0)]
    return SamplingPlan(steps=tuple(Step(level=a, to=b, guidance_scale=g) for a, b, g in steps), rule="consistency")


@dataclass(frozen=True)
class Case:
    """A student to save: its teacher, kind, and plans by number of steps."""

    build: Callable[..., Any]
    kind: str
    plan: Callable[[int], SamplingPlan]
    steps: tuple[int, ...]
    options: dict[str, Any]
    size: dict[str, int]


def case(
    build: Callable[..., Any], kind: str, plan: Callable[[int], SamplingPlan], *steps: int, **options: Any
) -> Case:
    return Case(build, kind, plan, steps, options, CLIP if build is tiny_wan else {})


V = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
CASES = {
    "sd-lora": case(tiny_stable_diffusion, "lora", lcm, 1, 2, 4),
    "sd-full-guidance-input": case(tiny_stable_diffusion, "full", lambda k: lcm(k, 5.0), 1, 2, guidance_input=True),
    "sd-full-odd-levels": case(tiny_stable_diffusion, "full", lambda k: uniform_plan(k, 2.0), 1, 3),
    "sd-v-lora": case(tiny_stable_diffusion, "lora", renoising, 1, 2, 4, **V),
    "sd-v-full": case(tiny_stable_diffusion, "full", lambda k: uniform_plan(k, 2.0), 1, 2, 4, **V),
    "sd3-lora": case(tiny_stable_diffusion_3, "lora", renoising, 1, 2, 4),
    "sd3-full-dynamic-shift": case(
        tiny_stable_diffusion_3, "full", lambda k: uniform_plan(k, 3.0), 1, 4, dynamic_shift=True
    ),
    "wan-lora": case(tiny_wan, "lora", lambda k: uniform_plan(k, 2.0), 1, 4),
    "wan-full": case(tiny_wan, "full", renoising, 1, 2),
    "wan2-lora": case(tiny_wan, "lora", two_scales, 3, two_transformers=True),
    "wan2-full": case(tiny_wan, "full", uniform_plan, 4, two_transformers=True),
    "ddpm-lora": case(tiny_ddpm, "lora", lcm, 1, 2, 4),
    "ddpm-full": case(tiny_ddpm, "full", uniform_plan, 1, 2, 4),
}
RUNS = [(name, k) for name, c in CASES.items() for k in c.steps]


@dataclass(frozen=True)
class Saved:
    """A student's folder, its base's beside it, and what was in memory when it was saved."""

    folder: Path
    base: Path
    teacher: Denoiser
    student: Denoiser
    manifest: Manifest


def trained(teacher: Denoiser, kind: str) -> tuple[Denoiser, Denoiser]:
    """The teacher and a moved student, beside whose LoRA is another role's; alpha is not the rank."""
    networks = Networks(teacher, kind, rank=2, alpha=3)
    roles = [networks.trained(name) for name in ("student", "fake_score")]
    random = torch.Generator().manual_seed(1)
    for role in roles:
        for p in role.parameters.values():
            moved = 0.3 * torch.randn(p.shape, generator=random)
            p.data = moved if kind == "lora" else p.data + moved * p.data.std(correction=0)
    return networks.teacher().denoiser, roles[0].denoiser


def saved(folder: Path, name: str = "sd-lora", base: Path | None = None) -> Saved:
    """A case's student in `folder`/student; its base is made in `folder`/base unless given."""
    c = CASES[name]
    if base is None:
        base = folder / "base"
        c.build(base, **c.options)
    loaded = load(base)
    plans = {k: c.plan(k) for k in c.steps}
    manifest = Manifest(
        base=str(base),
        pipeline=type(loaded.pipeline).__name__,
        fingerprint=fingerprint(loaded),
        method="lcm",
        kind=c.kind,  # type: ignore[arg-type]
        plans=plans,
        **c.size,
    )
    teacher, student = trained(loaded, c.kind)
    save_student(folder / "student", student, manifest)
    return Saved(folder / "student", base, teacher, student, manifest)


def latents(denoiser: Denoiser, manifest: Manifest, steps: int) -> Tensor:
    """Of the card's prompts and seeds."""
    shape = denoiser.latent_shape(manifest.height, manifest.width, manifest.num_frames)
    return sample(denoiser.at(shape), denoiser.encode(PROMPTS), manifest.plan(steps), [0, 1], shape)


def snippet_of(folder: Path, steps: int) -> str:
    """The code under the heading of a number of steps, as it stands."""
    text = (folder / "README.md").read_text()
    found = re.search(rf"^### {steps} steps?\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, text
    return found[1]


# Runs in a process without fewstep. The snippets are run as they are; what reaches the decoder (for pixel models, the
# images) is noted on the way.
HARNESS = """
import json, os, runpy, sys
try:
    import fewstep
except ImportError:
    pass
else:
    raise SystemExit("fewstep can be imported")
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DDPMPipeline

seen = []
def noting(method):
    def noted(self, first, *args, **kwargs):
        seen.append(torch.as_tensor(first))
        return method(self, first, *args, **kwargs)
    return noted
for vae in (AutoencoderKL, AutoencoderKLWan):
    vae.decode = noting(vae.decode)
to_pil = DDPMPipeline.numpy_to_pil
DDPMPipeline.numpy_to_pil = noting(lambda self, images: to_pil(images))

for folder, steps in json.loads(sys.argv[1]):
    os.chdir(folder)
    seen.clear()
    runpy.run_path(f"{steps}.py", run_name="__main__")
    (latents,) = seen
    torch.save(latents, f"{steps}.pt")
"""


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Saved]:
    """All cases saved, and every snippet of every card run in one process that cannot import this project."""
    folder = tmp_path_factory.mktemp("students")
    all_saved = {name: saved(folder / name, name) for name in CASES}
    for name, steps in RUNS:
        student = all_saved[name].folder
        (student / f"{steps}.py").write_text(snippet_of(student, steps))
    site = folder / "site"
    site.mkdir()
    # a torchvision without its operators keeps diffusers from being imported; fewstep declares them when it is
    # imported, a process without fewstep must do so by itself
    compat = (root / "samplers" / "compat.py").read_text()
    (site / "sitecustomize.py").write_text(
        f"{compat}\ndeclare_torchvision_operators()\nimport sys\nsys.modules['fewstep'] = None\n"
    )
    jobs = json.dumps([(str(all_saved[name].folder), steps) for name, steps in RUNS])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, jobs],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return all_saved


def decoded(denoiser: Denoiser, latents: Tensor) -> Tensor:
    """What a stock pipeline gives to its decoder; of pixel models the images, (B, H, W, C)."""
    vae = getattr(denoiser.pipeline, "vae", None)
    if vae is None:
        return (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    if hasattr(vae.config, "latents_mean") and latents.ndim == 5:
        mean, std = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return latents * std + mean
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)


@pytest.mark.parametrize(("name", "steps"), RUNS, ids=[f"{name}-{k}" for name, k in RUNS])
def test_the_snippet_of_the_card_gives_the_same_latents_as_sample(students: dict[str, Saved], name: str, steps: int):
    """Those of the student as it was trained; the teacher's are elsewhere, in every row."""
    s = students[name]
    theirs = torch.load(s.folder / f"{steps}.pt")
    ours, teachers = (decoded(d, latents(d, s.manifest, steps)) for d in (s.student, s.teacher))
    assert (ours - theirs).abs().max() < 1e-4
    assert ((teachers - theirs).flatten(1).norm(dim=1) > 0.01 * teachers.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("name", CASES)
def test_a_saved_student_loads_as_it_was(students: dict[str, Saved], name: str):
    s = students[name]
    loaded, manifest = load_student(s.folder)
    assert manifest == s.manifest
    steps = max(manifest.plans)
    torch.testing.assert_close(latents(loaded, manifest, steps), latents(s.student, manifest, steps), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=f"steps 7: this student samples in {min(manifest.plans)}"):
        manifest.plan(7)


@pytest.mark.parametrize("name", CASES)
def test_what_the_folder_holds(students: dict[str, Saved], name: str):
    """One LoRA file per network at the top and nothing beside it that a loader could take for one; or a pipeline."""
    s = students[name]
    here = {p.name for p in s.folder.iterdir()} - {f"{k}.{end}" for k in s.manifest.plans for end in ("py", "pt")}
    here -= {"image.png", "clip.gif"}
    weights = {WEIGHTS} | ({"pytorch_lora_weights_transformer_2.safetensors"} if name.startswith("wan2") else set())
    if name.endswith("lora") and not name.startswith("ddpm"):
        assert here == {*weights, "scheduler", "fewstep.json", "README.md"}
    else:
        own = {k for k in s.teacher.pipeline.components if getattr(s.teacher.pipeline, k) is not None}
        assert here == {*own, "model_index.json", "fewstep.json", "README.md"} | ({"peft"} if "lora" in name else set())


def test_peft_reads_the_lora_that_the_pipeline_cannot(students: dict[str, Saved]):
    """On the base's network it predicts what the saved network does, which has it added in."""
    from diffusers import UNet2DModel
    from peft import PeftModel

    s = students["ddpm-lora"]
    unet = PeftModel.from_pretrained(UNet2DModel.from_pretrained(s.base / "unet"), s.folder / "peft")
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 10])
    with torch.no_grad():
        expected = load(s.folder).network(x, t).sample
        torch.testing.assert_close(unet(x, t).sample, expected, rtol=0, atol=1e-5)


def test_saving_leaves_the_pipeline_in_memory_as_it_was(students: dict[str, Saved]):
    """A full student and its scheduler stand in the pipeline only while it is written."""
    pipeline = students["sd-v-full"].teacher.pipeline
    assert pipeline.unet is students["sd-v-full"].teacher.network
    before = json.loads((students["sd-v-full"].base / "scheduler" / "scheduler_config.json").read_text())
    assert pipeline.scheduler.config.set_alpha_to_one == before["set_alpha_to_one"]


@pytest.mark.parametrize("name", ["sd-lora", "sd-full-guidance-input", "wan2-lora"])
def test_load_takes_a_run_and_a_students_folder(students: dict[str, Saved], tmp_path: Path, name: str):
    """As a denoiser that may be a teacher: no adapter is left, and the weights are the student's."""
    s = students[name]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student").symlink_to(s.folder)
    assert class_of(tmp_path / "run") == s.manifest.pipeline
    steps = max(s.manifest.plans)
    expected = latents(s.student, s.manifest, steps)
    for source in (s.folder, tmp_path / "run"):
        denoiser = load(source)
        assert not any("lora" in k for n in denoiser.networks.values() for k, _ in n.named_parameters())
        torch.testing.assert_close(latents(denoiser, s.manifest, steps), expected, rtol=0, atol=1e-4)


def test_a_lora_on_a_lora_student_is_saved_as_a_pipeline(students: dict[str, Saved], tmp_path: Path):
    """Plain diffusers could not load a base that is no pipeline."""
    s = saved(tmp_path, "sd-lora", base=students["sd-lora"].folder)
    assert not (s.folder / WEIGHTS).exists()
    loaded, manifest = load_student(s.folder)
    torch.testing.assert_close(latents(loaded, manifest, 2), latents(s.student, manifest, 2), rtol=0, atol=1e-4)
    assert "load_lora_weights" not in snippet_of(s.folder, 2)


def test_a_moved_base_is_named_by_the_caller(students: dict[str, Saved], tmp_path: Path):
    s = students["sd-lora"]
    student, base = tmp_path / "student", tmp_path / "moved"
    shutil.copytree(s.folder, student)
    shutil.copytree(s.base, base)
    change_manifest(student, base=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"student: its base cannot be loaded; .*gone: no such folder.*base="):
        load_student(student)
    loaded, manifest = load_student(student, base=base)
    torch.testing.assert_close(latents(loaded, manifest, 2), latents(s.student, manifest, 2), rtol=0, atol=2e-5)


def change_manifest(folder: Path, **values: Any) -> None:
    path = folder / "fewstep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_bad_students_are_refused_in_one_line(students: dict[str, Saved], tmp_path: Path):
    def spoiled(name: str = "sd-lora") -> Path:
        shutil.rmtree(tmp_path / "student", ignore_errors=True)
        return shutil.copytree(students[name].folder, tmp_path / "student")

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(UserError, match=match) as raised:
            load_student(folder)
        assert "\n" not in str(raised.value)

    folder = spoiled()
    change_manifest(folder, base=str(students["sd3-lora"].base))
    refused(folder, "a LoRA of another base; .*sd3-lora/base does not hold the weights")
    tuned = tmp_path / "tuned"
    shutil.copytree(students["sd-lora"].base, tuned)
    pipeline = tiny_stable_diffusion()
    scale_weights(pipeline.unet, 1.01)
    pipeline.unet.save_pretrained(tuned / "unet")
    change_manifest(folder, base=str(tuned))
    refused(folder, "a LoRA of another base; .*tuned does not hold")

    folder = spoiled()
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    refused(folder, rf"{WEIGHTS}: cannot be loaded as a LoRA: \w+: ")
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS}: cannot be loaded as a LoRA")
    (folder / WEIGHTS).write_bytes((students["sd3-lora"].folder / WEIGHTS).read_bytes())
    refused(folder, "name no layer of StableDiffusionPipeline")

    folder = spoiled("sd-v-full")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:1000])
    refused(folder, "cannot be loaded as StableDiffusionPipeline: ")
    (folder / "fewstep.json").write_text('{"format": 2}')
    refused(folder, "not a student's folder")

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    refused(tmp_path / "run", "this run has no student yet")


def test_a_failed_write_leaves_what_was_there(
    students: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At the last file, with everything else written."""
    s = students["sd-lora"]
    folder = shutil.copytree(s.folder, tmp_path / "student")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.samplers.student.card", full)
    with pytest.raises(UserError, match=r"student: cannot be written \(No space left on device\)"):
        save_student(folder, s.student, s.manifest)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    monkeypatch.undo()
    (folder / "image.png").touch()
    save_student(folder, s.student, s.manifest)
    assert not (folder / "image.png").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_the_card_says_what_it_is(students: dict[str, Saved], tmp_path: Path):
    """From the manifest and the run's config beside it; the hub takes its own ids alone as `base_model`."""
    s = students["sd-lora"]
    config = 'method: lcm\nvalidation_prompts: [a "quoted" fox]\nlearning_rate: 0.001\n'
    (tmp_path / "config.yaml").write_text(config)
    manifest = s.manifest.model_copy(update={"base": "someone/model", "revision": "v1"})
    save_student(tmp_path / "student", s.student, manifest)
    text = (tmp_path / "student" / "README.md").read_text()
    front, text = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "someone/model",
        "base_model_relation": "adapter",
        "tags": ["fewstep", "distillation", "lcm", "lora"],
    }
    assert "| 4 | 1, 0.76, 0.5, 0.26 | consistency | 1 | 4 |" in text
    assert f"```yaml\n{config}```" in text
    code = snippet_of(tmp_path / "student", 2)
    assert 'from_pretrained("someone/model", revision="v1", torch_dtype=torch.float32)' in code
    assert r'prompts = ["a \"quoted\" fox"]' in code
    assert "base_model" not in (s.folder / "README.md").read_text()
    assert read_manifest(tmp_path / "student") == manifest


def scale_weights(module: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fingerprint_is_the_same_in_half_precision(dtype: torch.dtype):
    module = tiny_ddpm().unet
    mark = fingerprint_of({"unet": module})
    assert same_weights(fingerprint_of({"unet": module.to(dtype)}), mark)
    assert same_weights(mark, fingerprint_of({"unet": module.to(torch.bfloat16)}))


def test_a_fingerprint_sees_light_fine_tuning_and_no_adapters():
    """Scaling flips no sign; noise of 1% of each weight's spread; a change of one layer kind alone."""
    module = tiny_ddpm().unet
    mark = fingerprint_of({"unet": module})

    def scaled(m: torch.nn.Module) -> None:
        scale_weights(m, 0.99)

    def noisy(m: torch.nn.Module) -> None:
        random = torch.Generator().manual_seed(0)
        for p in m.parameters():
            p.data += 0.01 * p.data.std(correction=0) * torch.randn(p.shape, generator=random)

    def attention(m: torch.nn.Module) -> None:
        for k, p in m.named_parameters():
            if "to_q.weight" in k:
                p.data *= 1.02

    for tune in (scaled, noisy, attention):
        other = copy.deepcopy(module)
        tune(other)
        assert not same_weights(fingerprint_of({"unet": other}), mark), tune.__name__
    assert not same_weights(fingerprint_of({"transformer": module}), mark)
    denoiser = denoiser_of(tiny_ddpm())
    assert fingerprint(denoiser) == mark
    trained(denoiser, "lora")
    assert fingerprint(denoiser) == mark
