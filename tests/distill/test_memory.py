"""The planner's bytes against those of real tensors."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.distill import planner
from fewstep.distill.config import ConfigError, TrainConfig
from fewstep.distill.distiller import Batch, Distiller
from fewstep.distill.memory import Autocast, Need, activations, base_bytes, call, need
from fewstep.distill.networks import require_grad
from fewstep.distill.planner import limit_of, plan
from fewstep.distill.random import Rngs
from fewstep.distill.run import methods_distiller, networks_of
from fewstep.samplers.adapters import bare, checkpointed
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.skeleton import skeleton
from tests.distill.runs import config
from tests.pipelines import tiny_ddpm, tiny_dit, tiny_pixart, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl

FAMILIES = [
    *(tiny_ddpm, tiny_dit, tiny_pixart, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan),
    *(tiny_flux, tiny_sana, tiny_stable_diffusion_xl),
]
B = 2


def saved(build: Callable[[], Any], folder: Path) -> tuple[Denoiser, Denoiser]:
    """A tiny denoiser, and the skeleton of the folder that holds it, where no weights are left."""
    pipeline = build()
    pipeline.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return denoiser_of(pipeline), skeleton(folder)


def made(settings: TrainConfig, teacher: Denoiser) -> Distiller:
    shape = teacher.latent_shape(settings.height, settings.width, settings.num_frames)
    return methods_distiller(settings, networks_of(settings, teacher.at(shape)))


@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_a_skeleton_keeps_what_the_real_network_keeps(build: Callable[[], Any], tmp_path: Path):
    """Names and shapes of all parameters, and, of one call with a graph, the bytes that autograd keeps.

    To 2%: without data the layout of some results is another, and with it which of them are views.
    """
    real, meta = saved(build, tmp_path / "pipeline")
    shapes = [{k: p.shape for k, p in d.network.named_parameters()} for d in (real, meta)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in meta.network.parameters()} == {"meta"}
    sizes = {"height": 64, "width": 64} if real.clips or build in (tiny_flux, tiny_sana) else {}  # their own are large
    sizes |= {"num_frames": 5} if real.clips else {}
    settings = config(tmp_path, method="dmd2", train_batch_size=B, student="lora", **sizes)
    counts = []
    for denoiser in (real, meta):
        shape = denoiser.latent_shape(*sizes.values())
        ask, network = call(settings, made(settings, denoiser).roles()["student"], shape, B)
        counts.append([activations(ask, network, checkpointing, fused=False) for checkpointing in (False, True)])
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    assert counts[0][1] < counts[0][0]


CASES = {
    "dmd2 lora": {"method": "dmd2", "student": "lora", "steps": [2]},
    "dmd2 full": {"method": "dmd2", "student": "full", "steps": [1], "ema_decay": 0.9},
    "dmd2 beside": {"method": "dmd2", "student": "full", "fake_score": "lora", "steps": [1]},
    "dmd2 gan": {"method": "dmd2", "student": "full", "steps": [1], "gan_weight": 0.01},
    "dmd2 smaller": {"method": "dmd2", "student": "full", "steps": [1], "student_config": {"mid_block_type": None}},
    "tsm": {"method": "tsm", "student": "full", "student_config": {"block_out_channels": [8, 8]}},
    "lcm full": {"method": "lcm", "student": "full"},
    "lcm input": {"method": "lcm", "student": "full", "guidance_scale": 2.0, "guidance_scale_max": 9.0},
    "sid lora": {"method": "sid", "student": "lora"},
}


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_moments_are_exact(name: str, tmp_path: Path):
    """Each role takes a step of torch's AdamW; gradients of one role lie at a time."""
    settings = config(tmp_path, train_batch_size=B, **CASES[name])
    real, meta = saved(tiny_stable_diffusion, tmp_path / "pipeline")
    method = made(settings, real)
    predicted = need(settings, made(settings, meta), meta, checkpointing=False)
    tensors = {p.data_ptr(): p for p in (*real.network.parameters(), *real.network.buffers())}
    gradients, moments = [], 0
    for role in method.roles().values():
        tensors |= {p.data_ptr(): p for p in role.parameters.values()}
        if role.trained:
            parameters = list(role.parameters.values())
            gradients.append(sum(_size(p) for p in parameters))
            optimizer = torch.optim.AdamW(parameters)
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            moments += sum(_size(v) for s in optimizer.state.values() for v in s.values())
    average = sum(map(_size, method.roles()["student"].parameters.values())) if settings.ema_decay else 0
    assert predicted.weights == sum(map(_size, tensors.values())) + average
    assert predicted.gradients == max(gradients)
    assert predicted.optimizer == moments


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Live(TorchDispatchMode):
    """Bytes of all storages that operations made and that live, and their peak."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.seen:
                self.seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return result

    def freed(self, key: int) -> None:
        self.now -= self.seen.pop(key)


def measured(settings: TrainConfig, method: Distiller, teacher: Denoiser, checkpointing: bool) -> int:
    """Peak of what lives beside weights while the roles' losses are built and differentiated, in bytes."""
    roles = method.roles()
    if checkpointing:
        for network in {id(n): n for r in roles.values() for n in map(bare, r.denoiser.networks.values())}.values():
            checkpointed(network)
    shape = teacher.latent_shape()
    condition = teacher.encode(["a cat"] * B, "")
    x0 = torch.randn(B, *shape, generator=torch.Generator().manual_seed(0))
    batch, rng = Batch(["a cat"] * B, shape, condition, x0), Rngs(0, 0, range(B))
    names = [n for n, r in roles.items() if r.trained]
    known = [p for r in roles.values() for n in r.denoiser.networks.values() for p in (*n.parameters(), *n.buffers())]
    known += [p for r in roles.values() for p in r.parameters.values()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Live(known) as live:
        require_grad(roles, names)
        draws = method.draw(batch, rng, 1000, names)
        for name in names:
            require_grad(roles, [name])
            for losses in method.loss(name, batch, draws, 1000):
                losses.total.backward()
            for p in roles[name].parameters.values():
                p.grad = None
    return live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_activations_are_within_a_factor_of_two(name: str, checkpointing: bool, tmp_path: Path):
    """Against everything that lives during draws, losses and backwards of an iteration, gradients included."""
    settings = config(tmp_path, train_batch_size=B, **CASES[name])
    real, meta = saved(tiny_stable_diffusion, tmp_path / "pipeline")
    predicted = need(settings, made(settings, meta), meta, checkpointing, fused=False)
    peak = measured(settings, made(settings, real), real, checkpointing)
    assert peak / 2 < predicted.activations + predicted.gradients < 2 * peak


def test_a_base_in_fewer_bits(tmp_path: Path):
    """bf16: half. nf4, int8: of linear layers alone; with their scales 4.127 and about 8 bits a weight."""
    base = denoiser_of(tiny_stable_diffusion())
    linear = {n: m.weight for n, m in base.network.named_modules() if isinstance(m, torch.nn.Linear)}
    few, scales = sum(w.numel() for w in linear.values()), sum(len(w) for w in linear.values())
    every = sum(p.numel() for p in base.network.parameters())

    def size(**changes: Any) -> int:
        return base_bytes(config(tmp_path, method="dmd2", **changes), base)

    assert size() == 4 * every
    assert size(base_dtype="bf16") == 2 * every
    assert size(base_dtype="bf16", quantization_config="int8") == 2 * (every - few) + few + 4 * scales
    nf4 = size(base_dtype="bf16", quantization_config="nf4") - 2 * (every - few)
    assert nf4 == pytest.approx(few * 4.127 / 8, rel=1e-3, abs=2)


def test_mixed_precision_keeps_what_autocast_does_on_a_gpu():
    """A product keeps bfloat16 copies of input and weight, a norm and what follows it until the next product float32."""
    first, norm, last = torch.nn.Conv2d(4, 8, 1), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 4, 1)
    network = torch.nn.Sequential(first, norm, torch.nn.SiLU(), last).to("meta")
    x = torch.empty(B, 4, 6, 6, device="meta", requires_grad=True)
    hidden, statistics = B * 8 * 36, 2 * B * 2

    def ask() -> Tensor:
        with Autocast(torch.bfloat16):
            return network(x)

    products = 2 * (x.numel() + first.weight.numel()) + 2 * (hidden + last.weight.numel())
    assert activations(ask, network) == products + 4 * (hidden + statistics) + 4 * hidden


def test_a_plan_says_what_fits(tmp_path: Path):
    """From a folder without weights; the line of the config itself; refusals of a method stand in the plan."""
    real, _ = saved(tiny_stable_diffusion, tmp_path / "pipeline")
    settings = config(tmp_path, method="dmd2", teacher=str(tmp_path / "pipeline"), gradient_checkpointing=True)
    text = plan(settings, "24GiB", 4)
    rows = [line for line in text.splitlines() if line.endswith(" yes")]
    assert len(rows) == 11
    assert "full student, LoRA fake score, checkpointing, FSDP over 4" in text
    full = sum(p.numel() for p in real.network.parameters())
    lora = sum(p.numel() for p in made(settings, real).roles()["student"].parameters.values())
    assert re.search(rf"^fake_score +{lora:,} +{full:,} +{lora:,}$", text, re.MULTILINE)
    assert re.search(rf"^student +{lora:,} +{full:,} +{full:,}$", text, re.MULTILINE)
    assert "LoRA on a shared base, checkpointing, FSDP over 4" in text
    assert "this config: LoRA on a shared base, checkpointing, 0." in text
    # sharded over many, what each device holds is still the whole base, in float32 whatever was asked, before it is cut
    base = skeleton(tmp_path / "pipeline")
    many = need(settings, made(settings, base), base, True, 1000)
    assert many.whole == base_bytes(settings, real)
    assert (Need(1, 2, 3, 4, 5, 6).total, Need(1, 2, 3, 4, 5, 16).total) == (11, 16)
    low = config(tmp_path, method="dmd2", teacher=str(tmp_path / "pipeline"), base_dtype="bf16")
    assert [line for line in plan(low, "24GiB", 4).splitlines() if "FSDP" in line and "GiB" not in line] == [
        line for line in text.splitlines() if "FSDP" in line and "GiB" not in line
    ]
    assert "which fits" in text
    small = plan(settings, "0.0001MiB", 4)
    assert "hold: none of these" in small
    assert "which does not fit" in small
    guided = config(tmp_path, method="lcm", teacher=str(tmp_path / "pipeline"), guidance_scale_max=9.0)
    assert "LoRA on a shared base: a guidance input would be a new layer of the base" in plan(guided, "24GiB")


def test_a_fifth_of_a_device_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What needs more is tight, and said to be; here all but nothing is to be kept free."""
    assert [planner.fits(most, 100) for most in (1, 80, 81, 100, 101)] == ["yes", "yes", "tight", "tight", "no"]
    saved(tiny_stable_diffusion, tmp_path / "pipeline")
    monkeypatch.setattr(planner, "FREE", 1 - 1e-9)
    text = plan(config(tmp_path, method="dmd2", teacher=str(tmp_path / "pipeline")), "24GiB", 4)
    assert len([line for line in text.splitlines() if line.endswith("   tight")]) == 11
    assert "hold: none of these\n24.00 GiB hold tightly: LoRA on a shared base; " in text
    assert "GiB, which is tight\n" in text


def test_what_a_plan_refuses(tmp_path: Path):
    assert limit_of("24GiB") == limit_of("24") == 24 * 2**30
    assert limit_of("80 GB") == 80 * 10**9
    for text in ("lots", "-1GiB", "0", "24TB"):
        with pytest.raises(ConfigError, match=f"^--memory {text}: not an amount of memory such as 24GiB$"):
            limit_of(text)
    with pytest.raises(UserError, match=r"no model_index\.json there"):
        plan(config(tmp_path, method="dmd2", teacher=str(tmp_path)))
