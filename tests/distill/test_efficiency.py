"""How networks run changes nothing of what is trained; what cannot run here is refused before weights load."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import Tensor

from fewstep.distill import efficiency, run
from fewstep.distill.config import ConfigError
from fewstep.distill.networks import Networks, require_grad
from fewstep.distill.run import refuse, train
from fewstep.samplers.adapters import bare, checkpointed
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, dtypes, load
from tests.distill.runs import config, metrics, write_images
from tests.distill.test_networks import ask, gradients, three
from tests.pipelines import tiny_pixart, tiny_stable_diffusion, tiny_wan
from tests.pipelines_large import tiny_stable_diffusion_xl

SMALL = {"max_train_steps": 3, "train_batch_size": 2, "checkpointing_steps": 3, "steps": [2], "method": "dmd2"}
GAN = {"gan_weight": 0.01, "fake_score_updates": 2}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """A config on a folder of pictures, with changes."""
    images = write_images(tmp_path / "images", 5)
    return lambda **changes: config(tmp_path, train_data=str(images), **(SMALL | GAN | changes))


def teacher() -> Denoiser:
    return denoiser_of(tiny_stable_diffusion())


def last(folder: Path) -> dict[str, str]:
    """Hash of each file of a run's last checkpoint."""
    return json.loads((folder / "checkpoints/step-000003/manifest.json").read_text())


FAULTS = """
import resource, sys, torch
from fewstep.distill.efficiency import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory(torch.device("cpu"))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**20) for _ in range(16)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Pages that the system hands over for 64 MiB, made and freed a third time."""


def test_freed_memory_is_there_for_the_next_iteration():
    assert not efficiency.keep_freed_memory(torch.device("meta"))
    if platform.libc_ver()[0] != "glibc":
        assert not efficiency.keep_freed_memory(torch.device("cpu"))
        return

    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, left = faults("kept"), faults("left")
    assert 10 * kept < left, (kept, left)  # of 16,384


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointing_trains_the_same_bits(settings: Callable[..., Any], kind: str):
    """Student, fake score, teacher and a discriminator that stops at the middle block, over three iterations."""
    without, folder = (
        train(settings(student=kind, gradient_checkpointing=on, name=str(on)), teacher=teacher())
        for on in (False, True)
    )
    assert last(folder) == last(without)
    assert metrics(folder) == metrics(without)


def counted(denoiser: Denoiser, calls: list[int]) -> Denoiser:
    """Notes each call of the first block."""
    denoiser.network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return denoiser


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_recomputation_has_the_adapter_of_its_forward(kind: str):
    """A student's forward; the fake score and the teacher are asked; then the student's backward, block by block."""
    plain, roles = three(kind), three(kind)
    require_grad(plain, ["student"])
    ask(plain["student"].denoiser).square().mean().backward()
    for network in {id(n): n for r in roles.values() for n in map(bare, r.denoiser.networks.values())}.values():
        checkpointed(network)
    require_grad(roles, ["student"])
    calls: list[int] = []
    student = counted(roles["student"].denoiser, calls)
    kept = ask(student).square().mean()
    ask(roles["fake_score"].denoiser)
    ask(roles["teacher"].denoiser)
    before, state = len(calls), getattr(bare(student.network), "_fewstep_active", None)
    kept.backward()
    assert len(calls) == before + 1
    assert getattr(bare(student.network), "_fewstep_active", None) == state
    expected, got = gradients(plain["student"]), gradients(roles["student"])
    assert got.keys() == expected.keys()
    assert all(got[k].equal(expected[k]) for k in expected)


def test_a_kernel_is_tried_in_the_network(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Of `auto` torch's own takes its place where the network gives it what it refuses; asked for, that is an error."""
    asked: list[Any] = []

    def refusing(denoiser: Denoiser) -> None:
        asked.append((denoiser, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        raise ValueError("Query/Key/Value should either all have the same dtype")

    made = Networks(teacher(), "lora", rank=2)
    roles = {"student": made.trained("student"), "teacher": made.teacher()}
    auto, named = (settings(attention=name, mixed_precision="bf16") for name in ("auto", "xformers"))
    assert efficiency.proven(auto, roles, refusing) == []  # torch's own needs no trial
    assert asked == []
    bare(made.base.network).down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(
        XFormersAttnProcessor()
    )
    assert efficiency.proven(auto, roles, lambda denoiser: None) == []
    with pytest.raises(
        UserError, match=r"^attention xformers: xformers fails in UNet2DConditionModel: Query/Key/Value"
    ):
        efficiency.proven(named, roles, refusing)
    (line,) = efficiency.proven(auto, roles, refusing)
    assert line.startswith("attention: sdpa (xformers fails in UNet2DConditionModel: Query/Key/Value should")
    assert efficiency.proven(auto, roles, refusing) == []
    assert asked == [(roles["student"].denoiser, False, True)] * 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_channels_last_is_a_layout(settings: Callable[..., Any], kind: str):
    """The weights lie otherwise, the numbers are the same to rounding, and the student is written and read."""
    made, rate = teacher(), {"learning_rate": 1e-4}
    plain = train(settings(student=kind, name="plain", **rate), teacher=teacher())
    folder = train(settings(student=kind, name="last", channels_last=True, **rate), teacher=made)
    lines = [metrics(f)[-1] for f in (folder, plain)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-3, abs=1e-5)
    assert made.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    if kind == "full":
        got, expected = (load(f / "student").network.state_dict() for f in (folder, plain))
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-3)
    with pytest.raises(UserError, match="channels_last: WanTransformer3DModel is no network of 2D convolutions"):
        efficiency.channels_last(denoiser_of(tiny_wan()).network)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_base_dtype_is_of_what_is_frozen(settings: Callable[..., Any], kind: str, tmp_path: Path):
    """The networks and text encoder in bfloat16, the autoencoder and whatever is trained in float32; from files too."""
    source = tmp_path / "teacher"
    tiny_stable_diffusion().save_pretrained(source)
    asked = settings(student=kind, base_dtype="bf16", teacher=str(source), name="files")
    loaded = load(source, **efficiency.loading(asked, ["unet"]))
    made = teacher()
    efficiency.cast_base(asked, made)
    for denoiser in (loaded, made):
        parts = denoiser.pipeline.components
        types = {n: {p.dtype for p in parts[n].parameters()} for n in ("unet", "text_encoder", "vae")}
        assert types == {"unet": {torch.bfloat16}, "text_encoder": {torch.bfloat16}, "vae": {torch.float32}}
    made = Networks(loaded, kind, rank=2)
    assert {p.dtype for p in made.trained("student").parameters.values()} == {torch.float32}
    folder = train(asked)
    exact = train(settings(student=kind, name="fp32", teacher=str(source)))
    assert metrics(folder)[-1]["student/loss"] == pytest.approx(metrics(exact)[-1]["student/loss"], rel=0.2)
    if kind == "lora":
        load(folder)  # its base in float32 is the same base


def test_encoders_wait_on_the_cpu_unless_told(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    moved: list[tuple[str, ...]] = []
    monkeypatch.setattr(Denoiser, "rest", lambda self, device, keep=(): moved.append((device, *keep)))
    for offload in (True, False):
        train(settings(max_train_steps=1, offload_encoders=offload, name=str(offload)), teacher=teacher())
    assert moved == [("cpu",)]


def test_what_waits_are_all_modules_but_the_networks():
    """And those to keep; of Wan 2.2 both transformers stay."""
    for pipeline, keep, waiting in (
        (tiny_stable_diffusion_xl(), ("text_encoder_2",), {"text_encoder", "vae"}),
        (tiny_wan(two_transformers=True), (), {"text_encoder", "vae"}),
    ):
        denoiser = denoiser_of(pipeline)
        denoiser.rest("meta", keep)
        modules = {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
        found = {n: {p.device.type for p in m.parameters()} for n, m in modules.items()}
        assert found == {n: {"meta" if n in waiting else "cpu"} for n in modules}
        assert len(modules) > len(waiting) + 1


class Adam8(torch.optim.AdamW):
    """A stand-in for bitsandbytes' optimiser."""


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bitsandbytes")
    module.optim = SimpleNamespace(AdamW8bit=Adam8)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_8bit_optimiser_is_bitsandbytes(settings: Callable[..., Any], bitsandbytes: None):
    weights = [torch.nn.Parameter(torch.zeros(2))]
    c = settings(use_8bit_adam=True, adam_beta1=0.5, adam_epsilon=1e-6, adam_weight_decay=0.1)
    made = efficiency.optimizer(c, weights, 0.3)
    assert type(made) is Adam8
    assert made.defaults | {"lr": 0.3, "betas": (0.5, 0.999), "eps": 1e-6, "weight_decay": 0.1} == made.defaults
    assert type(efficiency.optimizer(settings(), weights, 0.3)) is torch.optim.AdamW


@pytest.mark.parametrize("key", [{"use_8bit_adam": True}, {"quantization_config": "nf4"}], ids=lambda k: next(iter(k)))
def test_bitsandbytes_is_asked_for(settings: Callable[..., Any], key: dict, monkeypatch: pytest.MonkeyPatch):
    name = next(iter(key))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"^{name}: needs bitsandbytes; pip install bitsandbytes, or "):
        refuse(settings(**key))
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^{name}: bitsandbytes needs a GPU; "):
        refuse(settings(**key))


def test_a_lora_that_is_saved_inside_its_base_has_none_that_is_packed(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(efficiency, "refuse", lambda config: None)  # who asks for a GPU
    tiny_pixart().save_pretrained(tmp_path / "pixart")
    with pytest.raises(
        ConfigError, match="quantization_config: this teacher's pipeline takes no LoRA beside its weights"
    ):
        refuse(settings(quantization_config="nf4", teacher=str(tmp_path / "pixart")))
    tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
    refuse(settings(quantization_config="nf4", teacher=str(tmp_path / "sd")))


def test_a_quantised_base_is_diffusers_own(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """The networks alone, as `from_pretrained` takes it; of a LoRA's base only, and only while it loads."""
    import diffusers

    monkeypatch.setattr(diffusers, "PipelineQuantizationConfig", dict)
    nf4 = efficiency.loading(settings(quantization_config="nf4", base_dtype="bf16"), ["transformer"])
    assert nf4["quantization_config"] == {
        "quant_backend": "bitsandbytes_4bit",
        "quant_kwargs": {
            **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "components_to_quantize": ["transformer"],
    }
    assert nf4["torch_dtype"] == {"default": torch.bfloat16, "vae": torch.float32}
    int8 = efficiency.loading(settings(quantization_config="int8"), ["unet"])["quantization_config"]
    assert (int8["quant_backend"], int8["quant_kwargs"]) == ("bitsandbytes_8bit", {"load_in_8bit": True})
    assert efficiency.loading(settings(), ["unet"]) == dtypes("fp32")
    with pytest.raises(ConfigError, match=r"^config: quantization_config: needs student: lora; .*; got 'int8'$"):
        settings(quantization_config="int8", student="full")
    with pytest.raises(UserError, match="quantization_config: weights are quantised while they load"):
        efficiency.cast_base(settings(quantization_config="int8"), teacher())


def test_half_precision_of_two_kinds_needs_a_gpu(settings: Callable[..., Any]):
    with pytest.raises(UserError, match=r"^base_dtype fp16: beside mixed_precision: bf16 it needs a GPU"):
        train(settings(base_dtype="fp16", mixed_precision="bf16"), teacher=teacher())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"mixed_precision": "fp16"}, "^mixed_precision fp16: needs a GPU; on this device use bf16 or no$"),
        ({"attention": "xformers"}, "^attention xformers: needs a GPU; attention: sdpa runs everywhere$"),
        ({"channels_last": True}, "^channels_last: WanTransformer3DModel is no network of 2D convolutions"),
        ({"gradient_checkpointing": True}, "^gradient_checkpointing: WanTransformer3DModel does not support it"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_networks_cannot_do_is_refused_before_weights_load(
    key: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a folder from its configs, which is all that is left of it; of a teacher in memory before it is sampled."""
    from diffusers import WanTransformer3DModel

    made = tiny_wan(tmp_path / "teacher")
    for weights in (tmp_path / "teacher").rglob("*.safetensors"):
        weights.unlink()
    monkeypatch.setattr(WanTransformer3DModel, "_supports_gradient_checkpointing", False)
    monkeypatch.setattr(run, "load", None)
    monkeypatch.setattr(run.safeguards, "preflight", None)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    asked = {"method": "dmd2", "train_data": None, "prompts": str(tmp_path / "prompts.txt"), **key}
    for source, memory in ((tmp_path / "teacher", None), ("in memory", denoiser_of(made))):
        with pytest.raises(UserError, match=message):
            train(config(tmp_path, teacher=str(source), **asked), teacher=memory)
    assert not (tmp_path / "run").exists()


def test_compile_is_tried_before_weights_load(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    def broken(function: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            raise RuntimeError("\nno C++ compiler\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    refuse(settings())
    with pytest.raises(UserError, match=r"^compile: torch.compile fails here \(no C\+\+ compiler\)$"):
        refuse(settings(compile=True))
