"""The artifact: what a student's folder holds, that it loads as it was saved, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, load, load_student
from fewstep.samplers.manifest import WEIGHTS
from fewstep.samplers.student import save_student
from tests.pipelines import tiny_stable_diffusion
from tests.samplers.students import CASES, Saved, latents, saved, scale_weights, snippet_of


@pytest.mark.parametrize("name", CASES)
def test_a_saved_student_loads_as_it_was(students: dict[str, Saved], name: str):
    s = students[name]
    expected = latents(s.student, s.manifest, steps := max(s.manifest.plans))
    for fuse in (False, True) if name.endswith("lora") or name == "sd-v-full" else (False,):
        loaded, manifest = load_student(s.folder, fuse=fuse)
        assert manifest == s.manifest
        adapters = [getattr(network, "peft_config", None) for network in loaded.networks.values()]
        apart = name.endswith("lora") and s.student.takes_lora and (not fuse or bool(manifest.phase_ends))
        assert all(adapters) if apart else not any(adapters)
        torch.testing.assert_close(latents(loaded, manifest, steps), expected, rtol=0, atol=1e-4 if fuse else 2e-5)
    with pytest.raises(UserError, match=f"steps 7: this student samples in {min(manifest.plans)}"):
        manifest.plan(7)


@pytest.mark.parametrize("name", CASES)
def test_what_the_folder_holds(students: dict[str, Saved], name: str):
    """One LoRA file per network, or phase of one, at the top and nothing beside it that a loader could take for one; or a pipeline."""
    s = students[name]
    here = {p.name for p in s.folder.iterdir()}
    weights = {WEIGHTS} | ({"pytorch_lora_weights_transformer_2.safetensors"} if name.startswith("wan2") else set())
    if s.manifest.phase_ends:
        weights = {f"pytorch_lora_weights_phase_{i}.safetensors" for i in (1, 2)}
    if name.endswith("lora") and s.student.takes_lora:
        assert here == {*weights, "scheduler", "fewstep.json", "README.md"}
    else:
        own = {k for k in s.teacher.pipeline.components if getattr(s.teacher.pipeline, k) is not None}
        assert here == {*own, "model_index.json", "fewstep.json", "README.md"} | ({"peft"} if "lora" in name else set())


def test_peft_reads_the_lora_that_the_pipeline_cannot(students: dict[str, Saved]):
    """On the base's network it predicts what the saved network does, which has it added in."""
    from diffusers import UNet2DModel
    from peft import PeftModel

    s = students["ddpm-lora"]
    unet = PeftModel.from_pretrained(UNet2DModel.from_pretrained(Path(s.base) / "unet"), s.folder / "peft")
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 10])
    with torch.no_grad():
        expected = load(s.folder).network(x, t).sample
        torch.testing.assert_close(unet(x, t).sample, expected, rtol=0, atol=1e-5)


def test_saving_leaves_the_pipeline_in_memory_as_it_was(students: dict[str, Saved]):
    """A full student and its scheduler stand in the pipeline only while it is written."""
    pipeline = students["sd-v-full"].teacher.pipeline
    assert pipeline.unet is students["sd-v-full"].teacher.network
    before = json.loads((Path(students["sd-v-full"].base) / "scheduler" / "scheduler_config.json").read_text())
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
