"""Methods on every class of backbone, two iterations each: LoRA and full, to a student that plain diffusers runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill import load_config, train
from fewstep.samplers.load import FAMILIES, load, load_student
from fewstep.samplers.manifest import base_parameters, fingerprint
from fewstep.samplers.plan import sample
from tests.distill.runs import metrics, write_clips, write_images
from tests.pipelines import (
    tiny_classes,
    tiny_ddpm,
    tiny_dit,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl
from tests.samplers.students import snippet_of
from tests.samplers.test_card import decoded


@dataclass(frozen=True)
class Tiny:
    """A pipeline, two prompts for it, and the size of its samples where its own is large; with frames they are clips."""

    build: Callable[..., Any]
    prompts: tuple[str, str] = ("a red apple", "a cat")
    size: tuple[str, ...] = ()


TINY = {
    "ConsistencyModelPipeline": Tiny(tiny_classes, ("0", "3")),
    "DDPMPipeline": Tiny(tiny_ddpm, ("one", "two")),
    "DiTPipeline": Tiny(tiny_dit, ("golden retriever", "7")),
    "FluxPipeline": Tiny(tiny_flux, size=("height=16", "width=32")),  # see SIZES of tests/samplers/students.py
    "PixArtAlphaPipeline": Tiny(tiny_pixart),
    "PixArtSigmaPipeline": Tiny(lambda folder: tiny_pixart(folder, sigma=True)),
    "SanaPipeline": Tiny(tiny_sana, size=("height=32", "width=32")),
    "StableDiffusionPipeline": Tiny(tiny_stable_diffusion),
    "StableDiffusion3Pipeline": Tiny(tiny_stable_diffusion_3),
    "StableDiffusionXLPipeline": Tiny(lambda folder: tiny_stable_diffusion_xl(folder, depth=1)),
    "WanPipeline": Tiny(tiny_wan, size=("height=64", "width=64", "num_frames=5")),
}
UNGUIDED = ("ConsistencyModelPipeline",)
"""Whose stock call takes no guidance scale: the preflight of a guided training says that it cannot be compared."""


def test_every_class_is_here():
    """That a folder may be of."""
    assert TINY.keys() == FAMILIES.keys()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a teacher, pictures or clips with captions, and prompts; made once."""
    home = tmp_path_factory.mktemp("teachers")

    def folder(name: str) -> Path:
        tiny, path = TINY[name], home / name
        if not path.is_dir():
            tiny.build(path / "teacher")
            if any(said.startswith("num_frames") for said in tiny.size):
                write_clips(path / "data", tiny.prompts)
            else:
                write_images(path / "data", n=2, side=32)
            for i, prompt in enumerate(tiny.prompts):
                (path / "data" / f"{i}.txt").write_text(prompt)
            (path / "prompts.txt").write_text("\n".join(tiny.prompts))
        return path

    return folder


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")  # cards are written for earlier diffusers too
@pytest.mark.parametrize("student", ["lora", "full"])
@pytest.mark.parametrize("method", ["lcm", "dmd2"])
@pytest.mark.parametrize("name", TINY)
def test_a_method_trains_a_backbone(
    name: str,
    method: str,
    student: str,
    made: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compared: list[Any],
):
    """Every role has a loss; the student moved from its teacher, says what it is, and samples as labelled, here and there.

    The teacher was compared with its stock pipeline where that is asked for, and a scale that is an input of the network is
    told to the student in its plan.
    """
    folder, prompts = made(name), list(TINY[name].prompts)
    own = {  # the student's first step of dmd2 is nothing where fake score and teacher are still the same
        "lcm": (f"train_data={folder / 'data'}",),
        "dmd2": (f"prompts={folder / 'prompts.txt'}", "fake_score_updates=1"),
    }
    config = load_config(
        {"method": method, "teacher": str(folder / "teacher"), "student": student},
        [
            *(*own[method], f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "steps=[2]", "rank=2"),
            *("max_train_steps=2", "train_batch_size=2", "logging_steps=1", "learning_rate=0.01"),
            *(f"validation_prompts=[{', '.join(repr(p) for p in prompts)}]", "guidance_scale=3", *TINY[name].size),
            # one of the runs of a teacher is enough, and a preview has twenty steps of it
            *(f"preflight={str((method, student) == ('lcm', 'lora')).lower()}", "validation_guidance_scale=1"),
        ],
    )
    run = train(config)
    assert len(compared) == (config.preflight and name not in UNGUIDED)
    roles = {"student"} if method == "lcm" else {"student", "fake_score"}
    first, second = metrics(run)
    assert {key for key in first if key.endswith("/loss")} == {f"{role}/loss" for role in roles}
    assert second["iteration"] == 2
    teacher = load(folder / "teacher")
    loaded, manifest = load_student(run)
    assert (manifest.pipeline, manifest.kind, manifest.method) == (name, student, method)
    assert manifest.fingerprint == fingerprint(teacher)
    told = {(plan.nfe / steps, plan.embedded_guidance) for steps, plan in manifest.plans.items()}
    assert told == {(1, 3 if teacher.takes_guidance else None)}
    before, after = (base_parameters(d.network) for d in (teacher, loaded))
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    adapted = {k for k in before if k.removesuffix(".weight").endswith(tuple(f".{e}" for e in teacher.lora_targets))}
    assert bool(changed) != (student == "lora" and teacher.takes_lora)  # there it is beside the base's weights
    assert student == "full" or changed <= adapted
    shape = loaded.latent_shape(manifest.height, manifest.width, manifest.num_frames)
    latents, swapped, teachers = (
        sample(d, d.encode(said), manifest.plan(2), [0, 1], shape)
        for d, said in ((loaded, prompts), (loaded, prompts[::-1]), (teacher, prompts))
    )
    assert (latents - teachers).norm() > 1e-3 * latents.norm()
    assert (latents - swapped).norm() > 1e-3 * latents.norm() or not loaded.takes_prompts
    assert not loaded.takes_prompts or all(f"{prompt}" in (run / "student/README.md").read_text() for prompt in prompts)
    theirs = by_the_card(run / "student", monkeypatch)
    assert (decoded(loaded, latents) - theirs).abs().max() < 1e-4


def by_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the snippet of a student's card, as it stands, gives to the decoder in two steps; of pixel models images."""
    import diffusers

    seen: list[Tensor] = []

    def note(cls: type, name: str, keep: Callable[..., Any]) -> None:
        monkeypatch.setattr(
            cls, name, lambda self, x, *rest, **given: seen.append(torch.as_tensor(x)) or keep(self, x, *rest, **given)
        )

    for vae in (diffusers.AutoencoderDC, diffusers.AutoencoderKL, diffusers.AutoencoderKLWan):
        note(vae, "decode", vae.decode)
    for pipeline in (diffusers.ConsistencyModelPipeline, diffusers.DDPMPipeline):
        convert = pipeline.numpy_to_pil
        note(pipeline, "numpy_to_pil", lambda self, images, convert=convert: convert(images))
    monkeypatch.chdir(folder)
    exec(snippet_of(folder, 2), {"__name__": "__main__"})
    (given,) = seen
    return given
