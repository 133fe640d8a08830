"""Features: what plain hooks on the stock network see, and nothing computed after the deepest of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill.distiller import Role
from fewstep.distill.networks import Networks
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.features import captured, quarters
from fewstep.samplers.load import denoiser_of
from tests.pipelines import tiny_stable_diffusion
from tests.samplers.families import FAMILIES, inputs

T = torch.tensor([0.95, 0.99])
BLOCKS = {
    "stable_diffusion": ("up_blocks.0", "down_blocks.0", "mid_block", "down_blocks.1.resnets.0"),
    "stable_diffusion_3": ("transformer_blocks.1", "transformer_blocks.0", "norm_out"),
    "stable_diffusion_xl": ("mid_block", "down_blocks.0", "up_blocks.0.attentions.1"),
    "flux": ("single_transformer_blocks.0", "transformer_blocks.1", "norm_out"),
    "sana": ("transformer_blocks.1", "transformer_blocks.0", "norm_out"),
    "wan": ("blocks.1", "blocks.0.ffn", "norm_out"),
    "dit": ("transformer_blocks.1", "transformer_blocks.0.ff", "norm_out"),  # the first block's embedding runs again
    "pixart": ("transformer_blocks.1", "transformer_blocks.0.attn2", "norm_out"),
    "unet2d_classes": ("mid_block", "down_blocks.1", "up_blocks.1.resnets.1"),
    "unet2d": ("mid_block", "down_blocks.1", "up_blocks.1.resnets.1"),
}


def by_hand(name: str, network: Any, x: Tensor, time: Tensor, condition: Any, blocks: Sequence[str]) -> list[Tensor]:
    """Plain hooks on the stock network, called as its pipeline calls it, to the end."""
    seen: dict[str, Any] = {}
    modules = dict(network.named_modules())
    handles = [
        modules[block].register_forward_hook(lambda m, a, output, block=block: seen.update({block: output}))
        for block in blocks
    ]
    if name == "pixart":
        size = {"resolution": torch.full((len(x), 2), 16.0), "aspect_ratio": torch.ones(len(x), 1)}
        network(x, timestep=time, added_cond_kwargs=size, **condition.tensors)
    elif name in ("stable_diffusion", "unet2d", "unet2d_classes"):
        network(x, time, **condition.tensors)
    elif name == "stable_diffusion_xl":
        added = {
            "text_embeds": condition.tensors["text_embeds"],
            "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 2),
        }
        network(x, time, condition.tensors["encoder_hidden_states"], added_cond_kwargs=added)
    elif name == "flux":
        from diffusers import FluxPipeline

        places = FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
        packed = FluxPipeline._pack_latents(x, 2, 4, 8, 8)
        told = {"guidance": torch.ones(2), "img_ids": places, "txt_ids": torch.zeros(512, 3)}
        network(hidden_states=packed, timestep=time / 1000, **told, **condition.tensors)
    else:
        network(hidden_states=x, timestep=time, **condition.tensors)
    for handle in handles:
        handle.remove()
    # a down block returns (sample, skips), a block of SD 3 or Flux (text, sample)
    part = 1 if name in ("stable_diffusion_3", "flux") else 0
    return [seen[b] if isinstance(seen[b], Tensor) else seen[b][part] for b in blocks]


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[str]]:
    """Names of the layers that run, in order."""
    ran: list[str] = []
    leaves = [(name, m) for name, m in network.named_modules() if not list(m.children())]
    handles = [m.register_forward_pre_hook(lambda m, a, name=name: ran.append(name)) for name, m in leaves]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_hooks_on_the_stock_network_see(name: str):
    """In the order asked, and the same beside a prediction."""
    denoiser, x, condition = inputs(name)
    expected = by_hand(name, denoiser.network, x, denoiser.noise.model_time(T), condition, BLOCKS[name])
    features = denoiser.features(x, T, condition, BLOCKS[name])
    output, beside = denoiser.predict_with_features(x, T, condition, BLOCKS[name])
    assert output.equal(denoiser.predict(x, T, condition))
    for ours, again, theirs in zip(features, beside, expected, strict=True):
        assert ours.equal(theirs)
        assert again.equal(theirs)
        assert ours.std() > 0.01
    told = T - 0.04
    other = by_hand(name, denoiser.network, x, denoiser.noise.model_time(told), condition, BLOCKS[name])
    assert denoiser.features(x, T, condition, BLOCKS[name], told)[0].equal(other[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_runs_after_the_deepest_block(name: str):
    """Layer by layer the beginning of a whole call, which ends with the block's own last layer."""
    denoiser, x, condition = inputs(name)
    with recorded(denoiser.network) as whole:
        denoiser.predict(x, T, condition)
    for blocks in [BLOCKS[name][:1], BLOCKS[name][1:2], BLOCKS[name][:2]]:
        with recorded(denoiser.network) as ran:
            denoiser.features(x, T, condition, blocks)
        inside = [i for i, layer in enumerate(whole) if layer.startswith(tuple(f"{b}." for b in blocks))]
        assert ran == whole[: inside[-1] + 1]
        assert len(ran) < len(whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_hook_stays_behind(name: str):
    denoiser, x, condition = inputs(name)
    output = denoiser.predict(x, T, condition)
    denoiser.features(x, T, condition)
    assert not any(m._forward_hooks for m in denoiser.network.modules())
    assert denoiser.predict(x, T, condition).equal(output)


def test_default_blocks():
    """The bottleneck of a UNet; of a transformer the last block of each quarter."""
    names = {name: inputs(name)[0].feature_blocks for name in FAMILIES}
    assert names["stable_diffusion"] == names["stable_diffusion_xl"] == names["unet2d"] == ("mid_block",)
    assert names["unet2d_classes"] == ("mid_block",)
    assert names["stable_diffusion_3"] == names["sana"] == ("transformer_blocks.0", "transformer_blocks.1")
    assert names["dit"] == names["pixart"] == names["stable_diffusion_3"]
    assert names["wan"] == ("blocks.0", "blocks.1")
    assert names["flux"] == tuple(f"{part}transformer_blocks.{i}" for part in ("", "single_") for i in (0, 1))
    assert quarters([nn.Identity()] * 30, "blocks") == ("blocks.7", "blocks.14", "blocks.22", "blocks.29")
    denoiser, x, condition = inputs("wan")
    for ours, named in zip(
        denoiser.features(x, T, condition), denoiser.features(x, T, condition, names["wan"]), strict=True
    ):
        assert ours.equal(named)


def test_wan_joins_the_features_of_both_transformers():
    denoiser, x, condition = inputs("wan", rows=4)
    t = torch.tensor([0.5, 0.95, 0.8999, 0.9])
    blocks = ("blocks.1", "blocks.0")
    features = denoiser.features(x, t, condition, blocks)
    output, beside = denoiser.predict_with_features(x, t, condition, blocks)
    torch.testing.assert_close(output, denoiser.predict(x, t, condition))
    for i, network in enumerate(("transformer_2", "transformer", "transformer_2", "transformer")):
        row = slice(i, i + 1)
        alone = by_hand("wan", denoiser.networks[network], x[row], 1000 * t[row], condition[row], blocks)
        for ours, again, theirs in zip(features, beside, alone, strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(again[row], theirs, rtol=1e-4, atol=1e-5)


# gradients


def roles(name: str, *adapters: str) -> list[Role]:
    """On one base in memory, each adapter with random weights of its own."""
    denoiser, _, _ = inputs(name)
    base = denoiser.with_networks({n: copy.deepcopy(m) for n, m in denoiser.networks.items()})
    made = Networks(base, rank=2)
    trained = [made.trained(adapter) for adapter in adapters]
    for adapter, role in zip(adapters, trained, strict=True):
        generator = torch.Generator().manual_seed(len(adapter))
        for parameter in role.parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_()  # adding the next adapter took it away
    return trained


def gradients(role: Role) -> dict[str, Tensor]:
    return {k: p.grad for k, p in role.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("stable_diffusion", ("mid_block",)),
        ("stable_diffusion", ("down_blocks.0.attentions.0", "down_blocks.1.resnets.0")),
        ("stable_diffusion_3", ("transformer_blocks.0",)),
    ],
)
def test_gradients_reach_the_sample_and_the_adapter_that_is_asked(
    name: str, blocks: tuple[str, ...], checkpointing: bool
):
    """Those of plain hooks on a network that has only this adapter; none in layers that follow, none in another one.

    With gradient checkpointing the network is left inside of a checkpointed block.
    """
    _, x, condition = inputs(name)
    (alone,) = roles(name, "fake_score")
    role, other = roles(name, "fake_score", "student")
    if checkpointing:
        role.denoiser.network.enable_gradient_checkpointing()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.cat([f.square().flatten() for f in role.denoiser.features(mine, T, condition, blocks)]).sum().backward()
    time = alone.denoiser.noise.model_time(T)
    expected = by_hand(name, alone.denoiser.network, theirs, time, condition, blocks)
    torch.cat([f.square().flatten() for f in expected]).sum().backward()

    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(gradients(role), gradients(alone))
    assert gradients(other) == {}
    assert 0 < len(gradients(role)) < len(role.parameters)
    assert min(mine.grad.norm(), max(g.norm() for g in gradients(role).values())) > 0


# where hooks are not enough


def test_a_sharded_network_runs_to_its_end(tmp_path: Path):
    """FSDP: what a network gathered is freed by hooks of its end."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    denoiser, x, condition = inputs("stable_diffusion")
    expected = denoiser.features(x, T, condition)
    network = copy.deepcopy(denoiser.network)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in (network.mid_block, network):
            fully_shard(block, mesh=mesh)
        sharded = denoiser.with_networks({"unet": network})
        with recorded(network) as whole:
            sharded.predict(x, T, condition)
        with recorded(network) as ran:
            features = sharded.features(x, T, condition)
    finally:
        dist.destroy_process_group()
    assert ran == whole
    assert features[0].equal(expected[0])


def test_a_compiled_network_is_run_uncompiled():
    """Code compiled before does not call the hooks: without that, there are no features."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.after = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.block(x))

    network, x = Two(), torch.ones(1, 2)
    compiled = torch.compile(network, backend="eager")
    compiled(x)
    with captured(compiled, ["block"], stop=True) as outputs, recorded(network) as ran:
        compiled(x)
    assert ran == ["block"]
    assert outputs["block"].equal(network.block(x))


# mistakes


@pytest.mark.parametrize("ask", [Denoiser.features, Denoiser.predict_with_features])
def test_a_block_that_does_not_exist_is_refused_with_those_that_do(ask: Callable[..., Any]):
    denoiser, x, condition = inputs("stable_diffusion")
    with pytest.raises(
        UserError, match=r"UNet2DConditionModel has no block 'mid'; it has .*down_blocks\.1, .*mid_block"
    ):
        ask(denoiser, x, T, condition, ["mid_block", "mid"])
    denoiser, x, condition = inputs("wan")
    with pytest.raises(UserError, match=r"no block 'blocks\.2'; it has .*blocks\.0, blocks\.1, norm_out"):
        ask(denoiser, x, T, condition, ["blocks.2"])


@pytest.mark.parametrize("ask", [Denoiser.features, Denoiser.predict_with_features])
def test_a_block_that_does_not_run_is_refused(ask: Callable[..., Any]):
    """A list of blocks is never called; its entries are."""
    denoiser = denoiser_of(tiny_stable_diffusion())
    _, x, condition = inputs("stable_diffusion")
    with pytest.raises(UserError, match="up_blocks did not run"):
        ask(denoiser, x, T, condition, ["mid_block", "up_blocks"])
    assert not any(m._forward_hooks for m in denoiser.network.modules())
