"""The kernel asked for is the one that runs: stand-ins for xformers and flash-attn count their calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.samplers.attention import FUNCTIONS, kernels, trial, use_attention, why_not
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.pipelines import tiny_ddpm, tiny_dit, tiny_pixart, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROCESSORS = [
    *(tiny_stable_diffusion, tiny_stable_diffusion_xl, tiny_ddpm, tiny_dit, tiny_pixart, tiny_stable_diffusion_3),
]
DISPATCHED = [tiny_wan, tiny_flux]


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An xformers of plain attention, wherever diffusers would find the real one; the shapes that it was called with."""
    import diffusers.models.attention_dispatch as dispatch
    import diffusers.models.attention_processor as processors

    calls: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None, **_: Any):
        calls.append(tuple(q.shape))
        flat = q.ndim == 3  # (B heads, tokens, channels), else (B, tokens, heads, channels)
        q, k, v = (x[:, None] if flat else x.transpose(1, 2) for x in (q, k, v))
        bias = attn_bias[:, None] if attn_bias is not None and flat else attn_bias
        out = scaled_dot_product_attention(q, k, v, bias, scale=scale)
        return out[:, 0] if flat else out.transpose(1, 2)

    module, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = attend  # type: ignore[attr-defined]
    module.ops = ops  # type: ignore[attr-defined]
    for name, stand_in in (("xformers", module), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(processors, "xformers", module)
    monkeypatch.setattr(dispatch, "xops", ops)
    monkeypatch.setattr(dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    # nothing of CUDA is here: the trial runs on the CPU, the rest of the choice as it would on a card
    monkeypatch.setattr(
        "fewstep.samplers.attention.trial", lambda kernel, sizes, device, dtype: trial(kernel, sizes, CPU, dtype)
    )
    return calls


def ask(denoiser: Denoiser) -> Tensor:
    """A prediction with a gradient to the sample, (2, B, ...)."""
    x = torch.randn(2, *denoiser.latent_shape(**frames(denoiser)), generator=torch.Generator().manual_seed(3))
    prompts = ["goldfish", "cock"] if type(denoiser).__name__ == "DiT" else ["a cat", "a dog"]
    output = denoiser.predict(x.requires_grad_(), torch.tensor([0.7, 0.3]), denoiser.encode(prompts, ""))
    return torch.stack([output.detach(), torch.autograd.grad(output.square().mean(), x)[0]])


def frames(denoiser: Denoiser) -> dict[str, int]:
    return {"height": 64, "width": 64, "frames": 5} if denoiser.clips else {}


def is_asked_by_all(calls: list, denoiser: Denoiser, expected: Tensor) -> None:
    """Every attention of the network calls the kernel once, for the same answer; none after a way back to torch's."""
    network = denoiser.network
    count = sum(getattr(m, "processor", None) is not None for m in network.modules())
    torch.testing.assert_close(ask(denoiser), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == count > 0
    use_attention([network], "sdpa", GPU, torch.float32)
    calls.clear()
    assert ask(denoiser).equal(expected)
    assert (calls, kernels(network)) == ([], {"sdpa"})


@pytest.mark.parametrize("build", [*PROCESSORS, *DISPATCHED], ids=lambda f: f.__name__)
def test_xformers_runs_where_it_was_asked_for(build: Callable[[], Any], xformers: list, monkeypatch: Any):
    """Every attention of the network calls it, torch's function is called by none, and the answer is the same."""
    denoiser = denoiser_of(build())
    network, expected = denoiser.network, ask(denoiser)
    assert xformers == []
    assert kernels(network) == {"sdpa"}
    assert use_attention([network], "xformers", GPU, torch.float32) == "attention: xformers (as asked)"
    assert kernels(network) == {"xformers"}
    assert kernels(denoiser_of(build()).network) == {"sdpa"}  # others keep theirs
    xformers.clear()  # of the trial
    is_asked_by_all(xformers, denoiser, expected)


def test_sana_keeps_its_linear_attention(xformers: list):
    """`enable_xformers_memory_efficient_attention` would put softmax in its place; ours refuses, and auto falls back."""
    denoiser = denoiser_of(tiny_sana())
    expected = ask(denoiser)
    with pytest.raises(UserError, match=r"attention xformers: diffusers has none for SanaTransformer2DModel's Sana"):
        use_attention([denoiser.network], "xformers", GPU, torch.float32)
    line = use_attention([denoiser.network], "auto", GPU, torch.float32)
    assert line.startswith("attention: sdpa (xformers: diffusers has none for SanaTransformer2DModel's")
    assert ask(denoiser).equal(expected)


def test_auto_takes_xformers_only_after_a_trial(xformers: list, monkeypatch: pytest.MonkeyPatch):
    """Forwards and backwards, with the channels a head that the network has."""
    unet = denoiser_of(tiny_stable_diffusion()).network
    sizes = {m.inner_dim // m.heads for m in unet.modules() if getattr(m, "processor", None) is not None}
    assert use_attention([unet], "auto", CPU, torch.float32) == "attention: sdpa (xformers: needs a GPU)"
    assert use_attention([unet], "auto", GPU, torch.float32) == "attention: xformers (its trial passed)"
    assert {shape[-1] for shape in xformers} == sizes
    ops = sys.modules["xformers.ops"]

    def no_operator(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_backward`\nlong list")

    def no_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q + k.detach()) * v

    def not_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * 0).sqrt() * k * v

    for attend, said in ((no_operator, "No operator found"), (no_gradient, "no finite"), (not_finite, "no finite")):
        monkeypatch.setattr(ops, "memory_efficient_attention", attend)
        line = use_attention([unet], "auto", GPU, torch.float32)
        assert line.startswith("attention: sdpa (xformers: ")
        assert said in line
        assert "\n" not in line
        assert kernels(unet) == {"sdpa"}
        with pytest.raises(UserError, match=rf"^attention xformers: .*{said}"):
            use_attention([unet], "xformers", GPU, torch.float32)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A flash-attn of plain attention, where diffusers would find the real one; the shapes that it was called with."""
    import diffusers.models.attention_dispatch as dispatch

    calls: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, **_: Any):
        calls.append(tuple(q.shape))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, tokens, heads, channels)
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    module = ModuleType("stand_in")  # under its own name other packages would find it half installed
    module.flash_attn_func = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(FUNCTIONS, "flash", ("stand_in", "flash_attn_func"))
    monkeypatch.setattr(dispatch, "flash_attn_func", attend)
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(
        "fewstep.samplers.attention.trial", lambda kernel, sizes, device, dtype: trial(kernel, sizes, CPU, dtype)
    )
    return calls


@pytest.mark.parametrize("build", DISPATCHED, ids=lambda f: f.__name__)
def test_flash_runs_where_it_was_asked_for(build: Callable[[], Any], flash: list):
    """Every attention of the network calls it, with the same answer; other networks keep theirs."""
    denoiser = denoiser_of(build())
    network, expected = denoiser.network, ask(denoiser)
    assert flash == []
    assert use_attention([network], "flash", GPU, torch.float32) == "attention: flash (as asked)"
    assert kernels(network) == {"flash"}
    assert kernels(denoiser_of(build()).network) == {"sdpa"}
    sizes = {
        m.head_dim if hasattr(m, "head_dim") else m.inner_dim // m.heads
        for m in network.modules()
        if hasattr(m, "processor")
    }
    assert {shape[-1] for shape in flash} == sizes  # of the trial
    flash.clear()
    is_asked_by_all(flash, denoiser, expected)


def test_flash_is_for_networks_that_dispatch():
    """UNets have no processor for it, and torch's own function takes its flash kernel by itself."""
    unet, wan = (denoiser_of(build()).network for build in (tiny_stable_diffusion, tiny_wan))
    with pytest.raises(
        UserError, match="attention flash: diffusers has none for UNet2DConditionModel's AttnProcessor2_0"
    ):
        use_attention([unet], "flash", GPU, torch.bfloat16)
    with pytest.raises(UserError, match="attention flash: needs a GPU"):
        use_attention([wan], "flash", CPU, torch.bfloat16)
    assert why_not([wan], "flash", GPU, torch.bfloat16) == "flash-attn is not installed"


def test_what_is_not_installed_is_said():
    assert trial("xformers", [8], CPU, torch.float32) == "xformers is not installed"
    with pytest.raises(UserError, match=r"^attention xformers: needs a GPU; attention: sdpa runs everywhere$"):
        use_attention([denoiser_of(tiny_wan()).network], "xformers", CPU, torch.float32)
    plain = SimpleNamespace(modules=lambda: iter(()))
    assert use_attention([plain], "auto", CPU, torch.float32).startswith("attention: sdpa")  # type: ignore[list-item]
