"""Single files: the pipeline that they hold, from a config without weights; what is missing is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.samplers.load import class_of, config_of, denoiser_of, load, load_student, parts
from fewstep.samplers.manifest import fingerprint, same_weights
from fewstep.samplers.plan import sample, uniform_plan
from fewstep.samplers.single_file import split
from fewstep.samplers.skeleton import skeleton
from tests.pipelines import PROMPTS, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan
from tests.pipelines_large import tiny_sana, tiny_stable_diffusion_xl
from tests.samplers.original import publish
from tests.samplers.students import Saved, latents, saved
from tests.samplers.test_load import complaint

BUILDERS: dict[str, Callable[..., Any]] = {
    "sd15": tiny_stable_diffusion,
    "sd21": partial(tiny_stable_diffusion, prediction_type="v_prediction"),
    "sdxl": partial(tiny_stable_diffusion_xl, width=24),  # the encoders are told apart by their widths
    "sd3": tiny_stable_diffusion_3,
    "sana": tiny_sana,
    "wan": tiny_wan,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Pipelines in memory, each with the source that its single file is."""
    found = {}
    for name, build in BUILDERS.items():
        pipeline = build()
        found[name] = pipeline, publish(pipeline, tmp_path_factory.mktemp(name))
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_a_single_file_is_the_pipeline_that_was_saved(name: str, made: dict[str, tuple[Any, str]]):
    """Every weight, the fingerprint and the samples; the config folder has no weights of what the file holds."""
    pipeline, source = made[name]
    assert class_of(source) == type(pipeline).__name__
    memory, disk = denoiser_of(pipeline), load(source)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            state = getattr(disk.pipeline, part).state_dict()
            assert state.keys() == module.state_dict().keys()
            for key, value in module.state_dict().items():
                assert torch.equal(state[key], value), (part, key)
    assert fingerprint(disk) == fingerprint(memory)
    ours, theirs = ({k: v for k, v in d.pipeline.scheduler.config.items() if k[0] != "_"} for d in (disk, memory))
    assert ours == theirs
    shape = memory.latent_shape(*{"wan": (64, 64, 5), "sana": (64, 64)}.get(name, ()))
    ours, theirs = (sample(d, d.encode(PROMPTS), uniform_plan(2, 3.0), [0, 1], shape) for d in (disk, memory))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    bare = skeleton(source)
    assert bare.device.type == "meta"
    assert [tuple(p.shape) for p in bare.network.parameters()] == [tuple(p.shape) for p in disk.network.parameters()]


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_types_of_weights_are_those_asked_for_and_not_the_files(
    name: str, made: dict[str, tuple[Any, str]], tmp_path: Path
):
    """Published files are in float16; float32 unless told, and the autoencoder may have a type of its own."""
    pipeline, _ = made[name]
    source = publish(pipeline, tmp_path, torch.float16)
    disk = load(source)
    assert {p.dtype for p in disk.network.parameters()} == {torch.float32}
    assert same_weights(fingerprint(disk), fingerprint(denoiser_of(pipeline)))
    low = load(source, torch_dtype={"default": torch.bfloat16, "vae": torch.float32}).pipeline
    types = {n: next(m.parameters()).dtype for n, m in low.components.items() if isinstance(m, torch.nn.Module)}
    assert types == {n: torch.float32 if n == "vae" else torch.bfloat16 for n in types}
    assert len(types) == 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(tmp_path_factory.mktemp("student"), "sd-file-lora")


def test_a_student_of_a_single_file_finds_its_base(student: Saved, monkeypatch: pytest.MonkeyPatch):
    """From any folder; and from a pipeline folder with the same weights."""
    s = student
    monkeypatch.chdir("/")
    expected = latents(s.student, s.manifest, 2)
    for base in (None, s.folder.parent / "base"):
        denoiser, manifest = load_student(s.folder, base)
        torch.testing.assert_close(latents(denoiser, manifest, 2), expected, rtol=0, atol=1e-5)
    assert (
        "A student of `published+model.safetensors` (StableDiffusionPipeline)" in (s.folder / "README.md").read_text()
    )
    assert "base_model" not in (s.folder / "README.md").read_text()


def test_sources_are_split_where_they_are_written(tmp_path: Path):
    assert split("a+b.safetensors@c@d") == ("a+b.safetensors", "c@d")
    assert split("a.safetensors") == ("a.safetensors", None)
    assert split("org/name") is None
    assert parts("a+b.safetensors@c+l.safetensors+m") == ("a+b.safetensors@c", ["l.safetensors", "m"])
    assert parts("a.safetensors+l") == ("a.safetensors", ["l"])
    assert parts("org/name+x/l.safetensors") == ("org/name", ["x/l.safetensors"])
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    assert split(folder) is None


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "org/model.bin", "model.ckpt@org/name"])
def test_a_pickle_is_refused_unread(name: str, tmp_path: Path):
    (tmp_path / "org").mkdir()
    (tmp_path / name.partition("@")[0]).write_bytes(b"never read")
    line = complaint(lambda: load(tmp_path / name))
    assert line.endswith("a pickle, which can run any code when it is read; save its weights as .safetensors")


def test_what_is_no_checkpoint(made: dict[str, tuple[Any, str]], student: Saved, tmp_path: Path):
    file, config = made["sd15"][1].split("@")
    assert complaint(lambda: load(f"/nowhere.safetensors@{config}")) == "/nowhere.safetensors: no such file"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(file).read_bytes()[:2000])
    assert f"{broken}: cannot be read as .safetensors" in complaint(lambda: load(f"{broken}@{config}"))
    lora = student.folder / "pytorch_lora_weights.safetensors"
    line = complaint(lambda: load(f"{lora}@{config}"))
    assert (
        line
        == f"{lora}: no checkpoint of a known model; a LoRA, or a network alone, stands behind its pipeline, PIPELINE+{lora}"
    )
    assert "/nowhere: no such folder" in complaint(lambda: load(f"{file}@/nowhere"))


def test_a_file_alone_has_its_configs_from_the_hub(
    made: dict[str, tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which repository, diffusers tells from keys and shapes; without the hub the line says what to pass."""
    file, config = made["sd15"][1].split("@")
    line = complaint(lambda: load(file))
    published = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert line.startswith(f"{file}: configs: {published}: no such folder, not in the hub cache, and the hub")
    assert line.endswith(f"; {file}@FOLDER takes them from a pipeline folder")
    monkeypatch.setattr("fewstep.samplers.load.index_from_hub", lambda source, _: Path(config, "model_index.json"))
    assert config_of(file) == published
    assert class_of(file) == "StableDiffusionPipeline"
    flux = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1)}, flux)
    assert config_of(flux) == "black-forest-labs/FLUX.1-schnell"


def test_a_config_that_is_not_the_files(made: dict[str, tuple[Any, str]], tmp_path: Path):
    """Of another architecture, without what the file lacks, with two networks."""
    file, config = made["sd15"][1].split("@")
    state = load_file(file)
    del state["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(state, tmp_path / "partial.safetensors")
    line = complaint(lambda: load(f"{tmp_path / 'partial.safetensors'}@{config}"))
    assert line.endswith(f"lacks weights of the networks that {config} describes; a config of another model?")
    wide = made["sdxl"][1].split("@")[1]
    assert f"{file}@{wide}: cannot be loaded as StableDiffusionXLPipeline" in complaint(lambda: load(f"{file}@{wide}"))
    file, config = made["wan"][1].split("@")
    empty = Path(shutil.copytree(config, tmp_path / "empty"))
    for weights in empty.glob("vae/*.safetensors"):
        weights.unlink()
    line = complaint(lambda: load(f"{file}@{empty}"))
    assert line == f"{file}: holds no vae, nor does {empty}; {file}@FOLDER takes it from a whole pipeline folder"
    index = empty / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"transformer_2": ["diffusers", "WanTransformer3DModel"]})
    )
    assert "holds one network of two of WanPipeline" in complaint(lambda: load(f"{file}@{empty}"))
    assert "quantization_config: not of a single file" in complaint(
        lambda: load(f"{file}@{config}", quantization_config=1)
    )
