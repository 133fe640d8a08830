"""`PIPELINE+LORA`: students that others published, in diffusers' and in kohya's format, with their own scheduler and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from fewstep.distill.evaluation import Teacher
from fewstep.samplers.baseline import stock_images
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, load, load_pipeline, parts
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3

PROMPTS, SEEDS = ["a dog", "a cat"], [3, 5]


def call(unet: Any) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(x, torch.tensor([999, 500]), text).sample


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny_stable_diffusion(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path) -> Any:
    """Its pipeline with an adapter that moves it, scaled by alpha / rank = 2."""
    pipeline = load_pipeline(base)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(2)
    for name, p in pipeline.unet.named_parameters():
        if ".lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def files(adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same LoRA as diffusers writes it, and with kohya's names (LCM-LoRA's, Hyper-SD's), which carry alpha."""
    folder = tmp_path_factory.mktemp("lora")
    weights = get_peft_model_state_dict(adapted.unet)
    scaled = {k: v * (2 if ".lora_B." in k else 1) for k, v in weights.items()}  # the format has no alpha
    type(adapted).save_lora_weights(folder, unet_lora_layers=scaled)
    kohya: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".lora_")
        key = "lora_unet_" + layer.replace(".", "_")
        kohya |= {f"{key}.lora_{'down' if part == 'A' else 'up'}.weight": value, f"{key}.alpha": torch.tensor(4.0)}
    save_file({k: v.contiguous() for k, v in kohya.items()}, folder / "kohya.safetensors")
    return {"diffusers": folder / "pytorch_lora_weights.safetensors", "kohya": folder / "kohya.safetensors"}


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_it_is_added_into_the_weights(base: Path, adapted: Any, files: dict[str, Path], kind: str):
    """The network's output is the adapter's; no adapter is left, so that one of ours can be trained on top."""
    unet = load(f"{base}+{files[kind]}").network
    assert not any(".lora_" in name for name, _ in unet.named_parameters())
    want, before = call(adapted.unet), call(load_pipeline(base).unet)
    assert (want - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(call(unet), want, atol=1e-4, rtol=1e-4)


def test_two_loras_and_names_with_a_plus(base: Path, files: dict[str, Path], tmp_path: Path):
    once, twice = (load(f"{base}{n * ('+' + str(files['kohya']))}").network for n in (1, 2))
    key = next(k for k in once.state_dict() if k.endswith("attn1.to_q.weight"))
    own = load_pipeline(base).unet.state_dict()[key]
    torch.testing.assert_close(twice.state_dict()[key] - own, 2 * (once.state_dict()[key] - own))
    folder = tmp_path / "a+b"
    tiny_stable_diffusion(folder)
    assert parts(folder) == (str(folder), [])
    assert class_of(folder) == "StableDiffusionPipeline"


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
def test_its_scheduler_and_steps(base: Path, files: dict[str, Path], scheduler: str):
    """The stock pipeline's own call, with the scheduler of diffusers and the timesteps that the model card states."""
    import diffusers

    own = [999, 749, 499, 249]
    sampler = Teacher(f"{base}+{files['kohya']}").sampler(4, 1.0, scheduler, timesteps=own)
    assert sampler.scheduler == f"{scheduler} (999,749,499,249)"
    found = sampler.images(PROMPTS, SEEDS)

    pipeline = load_pipeline(base)
    pipeline.load_lora_weights(files["kohya"].parent, weight_name="kohya.safetensors")
    pipeline.scheduler = getattr(diffusers, f"{scheduler.upper()}Scheduler").from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    call = pipeline(PROMPTS, generator=generators, guidance_scale=1.0, timesteps=own, output_type="pt")
    torch.testing.assert_close(found, call.images, atol=1e-4, rtol=1e-4)
    spaced = Teacher(f"{base}+{files['kohya']}").sampler(4, 1.0, scheduler)
    assert spaced.scheduler == scheduler
    assert (spaced.images(PROMPTS, SEEDS) - found).abs().max() > 1e-3


def test_what_is_refused(base: Path, files: dict[str, Path], tmp_path: Path):
    """In one line each."""
    flow, pixels = tmp_path / "flow", tmp_path / "pixels"
    tiny_stable_diffusion_3(flow)
    tiny_ddpm(pixels)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for source, said in (
        (f"{base}+{tmp_path}/none.safetensors", "none.safetensors: no such LoRA"),
        (f"{base}+{tmp_path}/none/at/all", "no such LoRA"),
        (f"{pixels}+{files['kohya']}", "a DDPMPipeline takes no LoRA"),
        (f"{base}+{tmp_path}/other.safetensors", "other.safetensors: "),
    ):
        with pytest.raises(UserError) as refused:
            load_pipeline(source)
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no such LoRA"):
        class_of(f"{base}+{tmp_path}/none.safetensors")  # before anything loads
    with pytest.raises(UserError, match=r"^timesteps 999,499: 2 of them for 4 steps$"):
        Teacher(str(base)).sampler(4, timesteps=[999, 499])
    with pytest.raises(UserError, match=r"^timesteps: DDIMScheduler takes none of its own"):
        Teacher(str(base)).sampler(2, scheduler="ddim", timesteps=[999, 499]).images(PROMPTS, SEEDS)
    with pytest.raises(UserError, match=r"^scheduler lcm: cannot run on the levels of a flow"):
        Teacher(str(flow)).sampler(4, scheduler="lcm")
    assert stock_images(load_pipeline(base), PROMPTS, SEEDS, 2).shape[0] == 2
