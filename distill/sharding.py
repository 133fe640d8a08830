"""Every role's weights spread over the processes, by torch's `fully_shard`, and whole tensors in and out of the parts.

A parameter becomes a DTensor of which each process holds some rows; so do its gradient, its moving averages and its
optimiser's state. A network is gathered for a call one block at a time, and what is not in a block for the whole call.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fewstep.distill.config import ConfigError, TrainConfig
from fewstep.distill.distiller import Role
from fewstep.samplers.adapters import Adapted, bare
from fewstep.samplers.denoisers.base import Denoiser

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

PLUGINS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""What a launcher can ask accelerate for, and accelerate could do with one model and its optimiser alone."""

UNSHARDED = {
    "train_text_encoder": "a text encoder is not sharded",
    "channels_last": "only contiguous weights are",
    "use_8bit_adam": "its moments know no parts of tensors",
    "quantization_config": "packed weights are not cut into parts",
    "compile": "it has not been tried with shards",
    "nodes": "recorded nodes are not cut into parts",
    "eval_steps": "one process judges, and all must sample",
}
"""Keys that do not go with shards, where a config has them, and why."""


def refuse(config: TrainConfig) -> None:
    """ConfigError, before any weight loads, for keys that do not go with shards."""
    if config.sharding_strategy == "no_shard":
        return
    if config.mixed_precision == "fp16":
        raise ConfigError("config: mixed_precision: fp16 and sharding_strategy full_shard do not go together; use bf16")
    said = [
        f"config: {key}: not with sharding_strategy full_shard, {why}; use no_shard"
        for key, why in UNSHARDED.items()
        if getattr(config, key, None)
    ]
    if config.base_dtype != "fp32":
        said.append(
            f"config: base_dtype: {config.base_dtype} has not been tried with sharding_strategy full_shard; use fp32"
        )
    if said:
        raise ConfigError("\n".join(said))


def refuse_launch(config: TrainConfig, accelerator: Accelerator) -> None:
    """ConfigError where the launcher made other processes than the config means."""
    name = accelerator.distributed_type.value
    if name in PLUGINS:
        raise ConfigError(
            f"launcher: {name} of accelerate prepares one model alone, and a distillation has several; launch without "
            "it (accelerate launch --multi_gpu) and set sharding_strategy: full_shard"
        )
    if config.sharding_strategy == "full_shard" and accelerator.num_processes == 1:
        raise ConfigError(
            "config: sharding_strategy: full_shard spreads weights over processes, and this is the only one; start "
            "several, e.g. torchrun --nproc_per_node 2 -m fewstep.distill CONFIG, or use no_shard"
        )


def together(denoiser: Denoiser, device: torch.device) -> None:
    """Let copies of a denoiser with several networks call on every process those that any process's rows need.

    Rows of one process may be one network's and those of another the other's, and a call gathers the parts of all: one
    message before each call. To be done before roles are made.
    """

    def agreed(needed: list[bool]) -> list[bool]:
        flags = torch.tensor(needed, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return flags.bool().tolist()

    denoiser.agreed = agreed


def shard(roles: Iterable[Role], base: Denoiser, device: torch.device) -> None:
    """Spread the networks of roles and base, and the modules that roles own, over all processes; in place.

    Weights may lie in main memory: each block's go to `device`, and all but this process's part are freed, before the
    next block's do. `Role.parameters` become the parts. Every process must hold the same weights.
    """
    from torch.distributed.device_mesh import init_device_mesh

    roles = list(roles)
    modules = {bare(n): None for d in (base, *(r.denoiser for r in roles)) for n in d.networks.values()}
    modules |= {m: None for role in roles for m in role.modules.values()}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    places = {id(p): (module, name) for module in modules for name, p in module.named_parameters()}
    own = [{k: places[id(p)] for k, p in role.parameters.items()} for role in roles]
    for role in roles:
        role.parameters.clear()  # what they held would be moved to the device whole, and stay
    for module in modules:
        _shard(module, mesh)
    parts = {module: dict(module.named_parameters()) for module in modules}
    for role, names in zip(roles, own, strict=True):
        role.parameters.update({k: parts[module][name] for k, (module, name) in names.items()})


def _shard(module: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    # the outermost part, too, is freed after each call: torch's default would keep it, and it would neither see that
    # other parameters require gradients now nor a moving average put in its place
    for block in blocks(module):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered by itself: the entries of the network's own lists of modules."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (entry for entry in child if not isinstance(entry, nn.ModuleList | nn.ModuleDict))


def is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a process's part of a tensor. Torch's module takes a second to import, and only `shard` needs it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a part, which all processes must ask for together; what is no part is itself."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, which every process holds, placed as `like`; no messages."""
    if is_part(like):
        from torch.distributed.tensor import distribute_tensor

        # a copy: a chunk would keep the whole tensor in memory
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()
    return tensor


def skeleton(denoiser: Denoiser) -> dict[str, nn.Module]:
    """Copies of a denoiser's networks, adapters included, that hold no weights; made before they are sharded."""
    found = {}
    for name, network in denoiser.networks.items():
        module = bare(network)
        none: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()
        }
        found[name] = copy.deepcopy(module, none)  # deepcopy takes what it finds there for copied already
    return found


def gathered(denoiser: Denoiser, skeletons: dict[str, nn.Module], keep: bool) -> Denoiser:
    """The denoiser around whole networks in main memory; all processes must ask together, and those that `keep` get them."""
    networks: dict[str, Any] = {}
    for name, network in denoiser.networks.items():
        state: dict[str, Tensor] = {}
        for key, parameter in bare(network).named_parameters():
            tensor = whole(parameter.detach())
            if keep:
                state[key] = tensor.cpu()
        skeletons[name].load_state_dict(state, strict=False, assign=True)
        networks[name] = Adapted(skeletons[name], network.adapter) if isinstance(network, Adapted) else skeletons[name]
    alone = denoiser.with_networks(networks)
    alone.agreed = None
    return alone
