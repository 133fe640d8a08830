"""The model card: its snippets run as they stand, without fewstep, and give the student's own latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.manifest import read_manifest
from fewstep.samplers.student import save_student
from tests.samplers.students import CASES, Saved, latents, snippet_of
from tests.strangers import run

RUNS = [(name, k) for name, c in CASES.items() for k in c.steps]

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
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan, ConsistencyModelPipeline, DDPMPipeline

seen = []
def noting(method):
    def noted(self, first, *args, **kwargs):
        seen.append(torch.as_tensor(first))
        return method(self, first, *args, **kwargs)
    return noted
for vae in (AutoencoderDC, AutoencoderKL, AutoencoderKLWan):
    vae.decode = noting(vae.decode)
to_pil = DDPMPipeline.numpy_to_pil
for pipeline in (ConsistencyModelPipeline, DDPMPipeline):
    pipeline.numpy_to_pil = noting(lambda self, images: to_pil(images))

for folder, steps in json.loads(sys.argv[1]):
    os.chdir(folder)
    seen.clear()
    runpy.run_path(f"{steps}.py", run_name="__main__")
    (latents,) = seen
    torch.save(latents, f"{steps}.pt")
"""


@pytest.fixture(scope="module")
def seen(students: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every snippet of every card run in one process that cannot import this project: copies of the folders."""
    folder = tmp_path_factory.mktemp("seen")
    copies = {name: shutil.copytree(s.folder, folder / name) for name, s in students.items()}
    for name, steps in RUNS:
        (copies[name] / f"{steps}.py").write_text(snippet_of(copies[name], steps))
    run(HARNESS, folder, json.dumps([(str(copies[name]), steps) for name, steps in RUNS]))
    return copies


def decoded(denoiser: Denoiser, latents: Tensor) -> Tensor:
    """What a stock pipeline gives to its decoder; of pixel models the images, (B, H, W, C)."""
    vae = getattr(denoiser.pipeline, "vae", None)
    if vae is None:
        return (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    if hasattr(vae.config, "latents_mean") and latents.ndim == 5:
        mean, std = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return latents * std + mean
    return latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)


@pytest.mark.parametrize(("name", "steps"), RUNS, ids=[f"{name}-{k}" for name, k in RUNS])
def test_the_snippet_of_the_card_gives_the_same_latents_as_sample(
    students: dict[str, Saved], seen: dict[str, Path], name: str, steps: int
):
    """Those of the student as it was trained; the teacher's are elsewhere, in every row."""
    s = students[name]
    theirs = torch.load(seen[name] / f"{steps}.pt")
    ours, teachers = (decoded(d, latents(d, s.manifest, steps)) for d in (s.student, s.teacher))
    assert (ours - theirs).abs().max() < 1e-4
    assert ((teachers - theirs).flatten(1).norm(dim=1) > 0.01 * teachers.flatten(1).norm(dim=1)).all()


def test_the_card_says_what_it_is(students: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the manifest and the run's config beside it; the hub takes its own ids alone as `base_model`."""
    s = students["sd-lora"]
    config = 'method: lcm\nvalidation_prompts: [a "quoted" fox]\nvariant: null\n'
    (tmp_path / "config.yaml").write_text(config)
    manifest = s.manifest.model_copy(update={"base": "someone/model", "revision": "v1", "variant": "fp16"})
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
    assert '```yaml\nmethod: lcm\nvalidation_prompts: [a "quoted" fox]\n```' in text
    code = snippet_of(tmp_path / "student", 2)
    assert 'from_pretrained("someone/model", revision="v1", variant="fp16", ' in code
    assert r'prompts = ["a \"quoted\" fox"]' in code
    assert "base_model" not in (s.folder / "README.md").read_text()
    # a student on the hub as the base: by its id, not by where its files lie on this machine
    monkeypatch.setattr("fewstep.samplers.load.student_of", lambda source: str(students["sd-v-full"].folder))
    save_student(tmp_path / "second", s.student, manifest)
    text = (tmp_path / "second" / "README.md").read_text()
    assert 'from_pretrained("someone/model", revision="v1", variant="fp16", ' in snippet_of(tmp_path / "second", 2)
    assert str(students["sd-v-full"].folder) not in text
    assert "\n# someone/model in " in text
    assert "base_model: someone/model" in text
    assert read_manifest(tmp_path / "student") == manifest
