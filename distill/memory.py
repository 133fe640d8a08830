"""Bytes that a run needs on a device, counted on its real roles, which may be on the meta device.

Parameters, gradients and optimiser state are those of the roles that the method makes. Activations are what autograd keeps
of one call of the student with a graph, the shapes of every kept tensor summed; see `activations`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Distiller, Role
from fewstep.distill.efficiency import DTYPES, LOWER
from fewstep.distill.networks import require_grad
from fewstep.samplers.adapters import activate, bare
from fewstep.samplers.denoisers.base import Denoiser


@dataclass(frozen=True)
class Need:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int = 0
    whole: int = 0
    """Of sharded runs: the base before it is cut, when each device looks at the teacher and fills the cache."""

    @property
    def total(self) -> int:
        """At the worst moment: before training, in a backward, or in an optimiser's step, when activations are gone."""
        return max(self.whole, self.weights + self.gradients + self.optimizer + max(self.activations, self.scratch))


class _Fused(torch.autograd.Function):
    """What flash and memory-efficient attention keep: their inputs, the output and a number for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return (
                _Fused.apply(*args[:3])
                if len(args) > 2
                else _Fused.apply(*(kwargs[k] for k in ("query", "key", "value")))
            )
        return func(*args, **(kwargs or {}))


class Autocast(TorchFunctionMode):
    """CUDA's autocast, which does nothing on the meta device: products in `dtype`, norms and powers in float32."""

    lower = (
        *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, torch.matmul, torch.bmm),
        *(torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, functional.scaled_dot_product_attention),
    )
    higher = (
        *(functional.group_norm, functional.layer_norm, functional.rms_norm, functional.softmax, torch.softmax),
        *(Tensor.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp),
    )

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self.dtype if func in self.lower else torch.float32 if func in self.higher else None
        if dtype is None:
            return func(*args, **(kwargs or {}))

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return func(*map(cast, args), **{k: cast(v) for k, v in (kwargs or {}).items()})


class _NoPadding(TorchFunctionMode):
    """Text encoders look whether a mask masks anything; without data none does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all and args[0].is_meta:
            return torch.ones((), dtype=torch.bool)
        return func(*args, **(kwargs or {}))


@contextmanager
def kept(known: set[int]) -> Iterator[dict[int, int]]:
    """Within the block, bytes of each storage that autograd keeps, by its address; `known` ones are left out."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is told apart from the next only while its storage lives

    def pack(x: Tensor) -> Tensor:
        note(x, known, found)
        alive.append(x := x.detach())  # an output that its own node kept would never be freed
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def note(x: Tensor, known: set[int], found: dict[int, int]) -> None:
    """Add the storage of a tensor."""
    storage = x.untyped_storage()
    if storage._cdata not in known:
        found[storage._cdata] = storage.nbytes()


def activations(ask: Callable[[], Any], network: nn.Module, checkpointing: bool = False, fused: bool = True) -> int:
    """Bytes that autograd keeps of a call: tensors saved for its backward, each storage once, parameters left out.

    With checkpointing: inputs of all blocks, and what one block, the largest, keeps while it is computed again.

    Args:
        ask: calls the network with a graph.
        network: bare; its weights do not count.
        checkpointing: set the network so for the call.
        fused: attention by a kernel that keeps no matrix of weights, as on GPUs; else torch's plain products.
    """
    known = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}
    blocks: list[int] = []
    alive: list[Any] = []

    with kept(known) as found:

        def run(block: Any, *args: Any) -> Any:
            for x in args:
                if isinstance(x, Tensor):
                    note(x, known, found)
            with kept(known) as inside:
                output = block(*args)
            blocks.append(sum(inside.values()))
            alive.extend((args, output))
            return output

        if checkpointing:
            network.enable_gradient_checkpointing(run)  # type: ignore[operator]
        try:
            with _FusedAttention() if fused else sdpa_kernel(SDPBackend.MATH):
                alive.append(ask())
        finally:
            if checkpointing:
                network.disable_gradient_checkpointing()  # type: ignore[operator]
    return sum(found.values()) + max(blocks, default=0)


def call(config: TrainConfig, role: Role, shape: tuple[int, ...], prompts: int) -> tuple[Callable[[], Any], nn.Module]:
    """One call of a role, of this many rows, in the types that it computes in; and the network that takes it."""
    denoiser = role.denoiser
    network = bare(next(iter(denoiser.networks.values())))
    if role.adapter is not None:
        activate(network, role.adapter)
    require_grad({"role": role}, ["role"])
    if (own := weights_in(config)) != torch.float32:
        network = copy.deepcopy(network).to(own)
    lower = LOWER.get(config.mixed_precision)
    view = denoiser.with_networks({next(iter(denoiser.networks)): network})
    with torch.no_grad(), _NoPadding():
        condition = view.encode(_prompts(view, prompts)).to(denoiser.device)
    if view.takes_guidance:
        condition = condition.with_guidance(1.0)
    x = torch.zeros(prompts, *shape, device=denoiser.device)
    time = view.noise.model_time(torch.full((prompts,), 0.5)).to(denoiser.device)

    def ask() -> Tensor:
        with nullcontext() if lower is None else Autocast(lower):
            return view.call(network, x, time, condition)

    return ask, network


def _prompts(denoiser: Denoiser, n: int) -> list[str]:
    return [(denoiser.examples or ("a photo",))[0]] * n


def weights_in(config: TrainConfig) -> torch.dtype:
    """Type of a student's weights: a full one is trained in float32."""
    return torch.float32 if config.student == "full" else DTYPES[config.base_dtype]


def rows_with_graph(config: TrainConfig, method: Distiller) -> float:
    """Rows through a network, divided by the batch, whose graphs live at once; an upper bound.

    `forwards` counts those of an update. A role's losses come one after the other, each of at most two rows a sample
    (guided, or a fake and a real one); a student's stand beside the graph of its sample.
    """
    counts = {frozenset(re.split(r" and |, ", key)): calls["backward"] for key, calls in method.forwards().items()}
    alone = []
    for names, count in counts.items():
        fewer = {key: other for key, other in counts.items() if key < names}
        rows = count - max(fewer.values(), default=0)
        own = names.difference(*fewer)
        at_once = 3 if "student" in own else 2
        alone.append(min(rows, at_once) if getattr(config, "split_gradient", True) else rows)
    return max(alone)


def need(
    config: TrainConfig,
    method: Distiller,
    base: Denoiser,
    checkpointing: bool,
    devices: int = 1,
    fused: bool = True,
    known: dict[Any, int] | None = None,
) -> Need:
    """Bytes per device of a run.

    Args:
        config: the run's; its roles are `method`'s, the frozen networks `base`'s.
        method: see config.
        base: see config.
        checkpointing: whether its networks are set so.
        devices: that every network is sharded over; 1 = not.
        fused: as GPUs do it: attention that keeps no matrix, an optimiser that steps all tensors at once.
        known: activations that an earlier call found, by what they depend on; added to.
    """
    known = {} if known is None else known
    roles = method.roles()
    trained = {n: [p.numel() for p in r.parameters.values()] for n, r in roles.items() if r.trained}
    copies = sum(4 * p.numel() for r in roles.values() for p in r.parameters.values())
    if config.ema_decay is not None:
        copies += 4 * sum(trained["student"])
    weights = base_bytes(config, base) + copies
    gradients = 4 * max(map(sum, trained.values()))
    moments = sum(_moments(config, sizes) for sizes in trained.values())
    # a student may be smaller than its fake score; of like sizes it is the student
    largest = max((r for r in roles.values() if r.trained), key=lambda r: without_adapters(bare(r.denoiser.network)))
    network = bare(largest.denoiser.network)
    key = (largest.adapter is None, checkpointing, fused, config.mixed_precision, weights_in(config))
    if key not in known:
        shape = base.latent_shape(config.height, config.width, config.num_frames)
        known[key] = activations(*call(config, largest, shape, config.train_batch_size), checkpointing, fused)
    saved = known[key] * rows_with_graph(config, method)
    gathered = 2 * max((bytes_of(m) for m in _blocks(network)), default=0) if devices > 1 else 0
    return Need(
        math.ceil(weights / devices) + gathered,
        math.ceil(gradients / devices),
        math.ceil(moments / devices),
        int(saved),
        math.ceil(gradients / devices) if fused else 0,  # AdamW on a GPU makes one more tensor of each weight's size
        base_bytes(config, base) if devices > 1 else 0,
    )


def without_adapters(network: nn.Module) -> int:
    """Number of a network's parameters, those of LoRAs left out."""
    return sum(p.numel() for key, p in network.named_parameters() if ".lora_" not in key)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    return (block for part in network.children() if isinstance(part, nn.ModuleList) for block in part)


def _moments(config: TrainConfig, sizes: list[int]) -> int:
    """Of AdamW: two of four bytes, and a count of steps; in 8 bits two of one, with a scale for each 256."""
    if not config.use_8bit_adam:
        return sum(8 * n + 4 for n in sizes)
    return sum(8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in sizes)


def base_bytes(config: TrainConfig, base: Denoiser) -> int:
    """Of the frozen networks, adapters left out, as `base_dtype` and `quantization_config` keep them."""
    width = DTYPES[config.base_dtype].itemsize
    total = 0.0
    for network in base.networks.values():
        for name, module in bare(network).named_modules():
            if ".lora_" in name:
                continue
            for key, p in module.named_parameters(recurse=False):
                quantised = isinstance(module, nn.Linear) and key == "weight" and config.quantization_config
                if quantised == "nf4":  # a scale of one byte for 64, and one of four for 256 of these
                    total += p.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256))
                elif quantised == "int8":
                    total += p.numel() + 4 * len(p)
                else:
                    total += p.numel() * width
            total += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    return math.ceil(total)
