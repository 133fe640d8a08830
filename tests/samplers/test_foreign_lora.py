"""`PIPELINE+LORA`: students that others published, in the keys of each, with their own scheduler and steps."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan
from tests.pipelines_large import tiny_flux, tiny_stable_diffusion_xl
from tests.samplers import lora_files as files_of
from tests.samplers.lora_files import ALPHA, RANK, UNET, Layers, layers, product

PROMPTS, SEEDS = ["a dog", "a cat"], [3, 5]
ATTENTION = "to_q|to_k|to_v|to_out.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
FORMS = {
    "sdxl": ("kohya", "stability", "peft", "processors"),
    "sd3": ("peft",),
    "flux": ("peft", "kohya", "xlabs"),
    "wan": ("wan",),
}
BUILDERS: dict[str, Callable[..., Any]] = {
    "sdxl": tiny_stable_diffusion_xl,
    "sd3": tiny_stable_diffusion_3,
    "flux": tiny_flux,
    "wan": tiny_wan,
}


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
    half = load(f"{base}+{files['kohya']}*0.125").network  # as Hyper-SD of FLUX asks for
    torch.testing.assert_close(half.state_dict()[key] - own, 0.125 * (once.state_dict()[key] - own))
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
        (f"{base}+{files['kohya']}*much", "*much: the scale of a LoRA must be a number, as in "),
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Pipelines of the families of published students, in folders and in memory."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: (folder / name, build(folder / name)) for name, build in BUILDERS.items()}


def sdxl(pipeline: Any, form: str) -> tuple[dict[str, Layers], dict[str, Tensor], float]:
    """LCM-LoRA, Hyper-SD: kohya. DMD2, TCD, Lightning: as one of these. With text encoders: of kohya's own trainer."""
    unet = layers(pipeline.unet, UNET)
    if form == "peft":
        return {"unet": unet}, files_of.peft(unet, "unet"), 1.0
    if form == "processors":
        return {"unet": unet}, files_of.processors(unet, "unet"), 1.0
    name = files_of.stability(pipeline.unet) if form == "stability" else str
    taken, state = {"unet": unet}, files_of.kohya(unet, "lora_unet", name)
    if form == "stability":
        for part, prefix in (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")):
            taken[part] = files_of.clip(getattr(pipeline, part))
            state |= files_of.kohya(taken[part], prefix)
    return taken, state, ALPHA / RANK


def transformer(pipeline: Any, form: str) -> tuple[dict[str, Layers], dict[str, Tensor], float]:
    """Hyper-SD of SD 3 and FLUX: diffusers' keys. Others of FLUX: kohya's and XLabs'. Of Wan: its authors' names."""
    single = r"|single_transformer_blocks\.\d+\.proj_out"
    ends = {
        "peft": rf"{ATTENTION}|ff.net.0.proj|ff.net.2|norm1.linear|norm.linear|proj_mlp{single}",
        "kohya": rf"transformer_blocks\.\d+\.attn\.({ATTENTION})|norm1.linear|norm1_context.linear"
        rf"|ff.net.0.proj|ff.net.2|ff_context.net.0.proj|ff_context.net.2|norm.linear{single}",
        "xlabs": rf"{ATTENTION}{single}",
        "wan": r"to_q|to_k|to_v|to_out.0|ffn.net.0.proj|ffn.net.2",
    }[form]
    found = layers(pipeline.transformer, ends)
    make = {"kohya": files_of.flux_kohya, "xlabs": files_of.flux_xlabs, "wan": files_of.wan}
    state = make[form](found) if form in make else files_of.peft(found, "transformer")
    return {"transformer": found}, state, ALPHA / RANK if form in ("kohya", "wan") else 1.0


@pytest.mark.parametrize(("name", "form"), [(n, f) for n, forms in FORMS.items() for f in forms])
def test_published_keys(name: str, form: str, bases: dict[str, tuple[Path, Any]], tmp_path: Path):
    """Each layer gains up @ down * alpha / rank, no other changes; samples are those of diffusers' own loader."""
    folder, base = bases[name]
    taken, state, scale = (sdxl if name == "sdxl" else transformer)(base, form)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "published.safetensors")
    ours = load(f"{folder}+{tmp_path / 'published.safetensors'}").pipeline
    for part, module in base.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        gains = {
            k if k in dict(module.named_modules()) else k.removeprefix("text_model."): v
            for k, v in taken.get(part, {}).items()
        }
        loaded = getattr(ours, part).state_dict()
        for key, value in module.state_dict().items():
            pair = gains.pop(key.removesuffix(".weight"), None)
            want = value if pair is None else value + scale * product(*pair)
            torch.testing.assert_close(loaded[key], want, atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
        assert not gains

    theirs = type(base).from_pretrained(folder)
    theirs.load_lora_weights(tmp_path, weight_name="published.safetensors")
    size = {"height": 16, "width": 16} | ({"height": 64, "width": 64, "num_frames": 5} if name == "wan" else {})
    drawn = []
    for pipeline in (ours, theirs, base):
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        drawn.append(pipeline("a cat", num_inference_steps=2, generator=noise, output_type="latent", **size)[0])
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)
    assert (drawn[0] - drawn[2]).norm() > 0.01 * drawn[2].norm()
