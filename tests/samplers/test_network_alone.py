"""`PIPELINE+FILE.safetensors`, the network alone in diffusers' keys: SDXL-Lightning's and Hyper-SD's UNets, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.distill.evaluation import Teacher
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, load, load_pipeline
from tests.hub import keep
from tests.pipelines import tiny_ddpm, tiny_wan
from tests.pipelines_large import tiny_stable_diffusion_xl
from tests.samplers import lora_files
from tests.samplers.lora_files import UNET, Layers, layers, product

Build = Callable[[Path], Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An SDXL, in a folder and in memory."""
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    return folder, tiny_stable_diffusion_xl(folder)


def moved(network: torch.nn.Module) -> dict[str, Tensor]:
    """Its tensors, each somewhere else, in half precision as they are published."""
    random = torch.Generator().manual_seed(5)
    return {k: (v + 0.1 * torch.randn(v.shape, generator=random)).half() for k, v in network.state_dict().items()}


def write_lora(found: Layers, path: Path) -> None:
    save_file({k: v.clone() for k, v in lora_files.peft(found, "unet").items()}, path)


@pytest.fixture(scope="module")
def unet(base: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    weights = moved(base[1].unet)
    path = tmp_path_factory.mktemp("published") / "lightning_4step_unet.safetensors"
    save_file(weights, path)
    return path, weights


def test_its_weights_are_the_networks(base: tuple[Path, Any], unet: tuple[Path, dict[str, Tensor]]):
    """In float32; all else is the pipeline's, whose own call draws the same with that UNet in it."""
    (folder, pipeline), (path, weights) = base, unet
    ours = load(f"{folder}+{path}").pipeline
    for key, value in ours.unet.state_dict().items():
        assert value.dtype == torch.float32
        assert value.equal(weights[key].float()), key
    for name in ("text_encoder", "text_encoder_2", "vae"):
        for key, value in getattr(ours, name).state_dict().items():
            assert value.equal(getattr(pipeline, name).state_dict()[key])

    found = Teacher(f"{folder}+{path}").sampler(2, 1.0, "euler").images(["a cat"], [3])
    assert not torch.allclose(found, Teacher(str(folder)).sampler(2, 1.0, "euler").images(["a cat"], [3]), atol=0.01)
    theirs = load_pipeline(folder)
    theirs.unet.load_state_dict({k: v.float() for k, v in weights.items()})
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, timestep_spacing="trailing")
    noise = torch.Generator().manual_seed(3)
    drawn = theirs("a cat", num_inference_steps=2, guidance_scale=1.0, generator=noise, output_type="pt").images
    torch.testing.assert_close(found, drawn, atol=1e-4, rtol=1e-4)


def test_of_any_family_and_from_the_hub(
    base: tuple[Path, Any], unet: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pipeline that takes no LoRA, one of clips, and a file of a repository; a LoRA on top is added."""
    builds: tuple[tuple[Build, str], ...] = ((tiny_ddpm, "unet"), (tiny_wan, "transformer"))
    for build, part in builds:
        weights = moved(getattr(build(folder := tmp_path / build.__name__), part))
        save_file(weights, tmp_path / "alone.safetensors")
        found = load(f"{folder}+{tmp_path / 'alone.safetensors'}").network.state_dict()
        assert all(found[k].equal(v.float()) for k, v in weights.items())

    (folder, pipeline), (path, weights) = base, unet
    keep(tmp_path / "hub", "org/lightning", {"main": path.parent}, monkeypatch)
    taken = layers(pipeline.unet, UNET)
    write_lora(taken, tmp_path / "lora.safetensors")
    source = f"{folder}+org/lightning/{path.name}+{tmp_path / 'lora.safetensors'}"
    assert class_of(source) == "StableDiffusionXLPipeline"
    found = load(source).network.state_dict()
    for key, value in weights.items():
        pair = taken.get(key.removesuffix(".weight"))
        want = value.float() if pair is None else value.float() + product(*pair)
        torch.testing.assert_close(found[key], want, atol=1e-5, rtol=0)


def test_what_is_refused(base: tuple[Path, Any], unet: tuple[Path, dict[str, Tensor]], tmp_path: Path):
    """In one line each; the network is as it was."""
    (folder, pipeline), (path, weights) = base, unet
    experts = tmp_path / "experts"
    wan = tiny_wan(experts, two_transformers=True)
    key = "conv_in.weight"
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "less.safetensors")
    save_file(weights | {"time_embedding.cond_proj.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    save_file(weights | {key: torch.ones(8, 9, 3, 3)}, tmp_path / "inpainting.safetensors")
    save_file(moved(wan.transformer), tmp_path / "expert.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "unet.bin").write_bytes(b"never read")
    write_lora(layers(pipeline.unet, UNET), tmp_path / "lora.safetensors")
    own = "not the unet of this StableDiffusionXLPipeline"
    pickle = "a pickle, which can run any code when it is read; save its weights as .safetensors"
    for source, said in (
        (f"{folder}+{tmp_path}/less.safetensors", f"{own}: lacks 1 weights, e.g. {key}"),
        (
            f"{folder}+{tmp_path}/more.safetensors",
            f"{own}: has beside its own 1 weights, e.g. time_embedding.cond_proj",
        ),
        (f"{folder}+{tmp_path}/inpainting.safetensors", f"{own}: {key} is 8x9x3x3 and not 8x4x3x3"),
        (f"{folder}+{path}*0.5", "a whole unet, of which no part can be added; leave the *0.5 out"),
        (f"{folder}+{path}*1", "leave the *1 out"),
        (f"{folder}+{tmp_path}/lora.safetensors+{path}", "a whole unet, which would undo what stands before it"),
        (f"{folder}+{path}+{path}", "name it first, and once"),
        (f"{folder}+{tmp_path}/torn.safetensors", "cannot be read as .safetensors"),
        (f"{folder}+{tmp_path}/unet.bin", f"{tmp_path}/unet.bin: {pickle}"),
        (f"{folder}+org/name/unet.bin", f"org/name/unet.bin: {pickle}"),
        (f"{experts}+{tmp_path}/expert.safetensors", "one network, of transformer or transformer_2 of WanPipeline?"),
        (
            str(path),
            f"no checkpoint of a known model; a LoRA, or a network alone, stands behind its pipeline, PIPELINE+{path}",
        ),
    ):
        with pytest.raises(UserError) as refused:
            load_pipeline(source)
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="a pickle"):
        class_of(f"{folder}+{tmp_path}/unet.bin")  # before anything loads
