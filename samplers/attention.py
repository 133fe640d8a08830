"""Which kernel computes a network's attention: torch's own, xformers' or flash-attn's, by diffusers' mechanisms.

diffusers has two. Newer transformers (Flux, Wan) dispatch each call: `set_attention_backend`. UNets, DiT, PixArt, SD 3 and
Sana have processor classes, on which that call does nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.samplers.errors import UserError, reason

CLASSES = {
    "sdpa": {"XFormersAttnProcessor": "AttnProcessor2_0", "XFormersJointAttnProcessor": "JointAttnProcessor2_0"},
    "xformers": {"AttnProcessor2_0": "XFormersAttnProcessor", "JointAttnProcessor2_0": "XFormersJointAttnProcessor"},
    "flash": {},
}
"""Processors that compute the same with another kernel. Others (Sana's linear attention) are left as they are."""

FUNCTIONS = {"xformers": ("xformers.ops", "memory_efficient_attention"), "flash": ("flash_attn", "flash_attn_func")}
"""Module and function of kernels from outside torch, of queries, keys, values (B, tokens, heads, channels)."""

BACKENDS = {"sdpa": "native", "xformers": "xformers", "flash": "flash"}
"""Names in diffusers' dispatcher."""


def use_attention(networks: Iterable[nn.Module], asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """Let networks compute attention by the kernel asked for, and look that they do; a line that says so.

    Args:
        networks: bare modules, not views with an adapter.
        asked: `sdpa`, `xformers`, `flash`, or `auto`: xformers on a GPU where it is installed, takes these networks and
            passes a trial forwards and backwards, else sdpa.
        device: where they will run.
        dtype: of queries, keys and values.

    Raises:
        UserError: for a kernel that cannot run here, or that a network has no processor for.
    """
    networks = list(networks)
    kernel, why = asked, "as asked"
    if asked == "auto":
        reason = why_not(networks, "xformers", device, dtype)
        kernel, why = ("xformers", "its trial passed") if reason is None else ("sdpa", f"xformers: {reason}")
    elif asked != "sdpa" and (reason := why_not(networks, asked, device, dtype)) is not None:
        raise UserError(f"attention {asked}: {reason}; attention: sdpa runs everywhere")
    for network in networks:
        _set(network, kernel)
        used = kernels(network)
        if used - {kernel}:
            raise UserError(
                f"attention {kernel}: {type(network).__name__} computes it by {', '.join(sorted(used - {kernel}))}"
            )
    return f"attention: {kernel} ({why})"


def why_not(networks: Iterable[nn.Module], kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel from outside torch cannot compute the attention of networks, None where it can."""
    sizes: set[int] = set()
    for network in networks:
        for module in _attention(network):
            processor = module.processor
            name = type(processor).__name__
            known = CLASSES[kernel].keys() | CLASSES[kernel].values()
            if not hasattr(processor, "_attention_backend") and name not in known:
                return f"diffusers has none for {type(network).__name__}'s {name}"
            sizes.add(getattr(module, "head_dim", None) or module.inner_dim // module.heads)
    if not sizes:
        return "no attention of diffusers' in these networks"
    if device.type != "cuda":
        return "needs a GPU"
    return trial(kernel, sizes, device, dtype)


def trial(kernel: str, sizes: Iterable[int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Run a kernel forwards and backwards at these numbers of channels a head; why it failed, None where it did not."""
    module, name = FUNCTIONS[kernel]
    try:
        attend = getattr(importlib.import_module(module), name)
    except ImportError:
        return f"{module.split('.')[0].replace('_', '-')} is not installed"
    for size in sorted(sizes):
        q, k, v = (torch.randn(1, 64, 2, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        try:
            attend(q, k, v).float().square().sum().backward()
        except Exception as error:  # a kernel that lacks an operator for this card says so in its own kinds
            return f"fails with {size} channels a head in {str(dtype).removeprefix('torch.')} ({reason(error)})"
        if not all(isinstance(x.grad, Tensor) and bool(x.grad.isfinite().all()) for x in (q, k, v)):
            return f"has no finite gradient with {size} channels a head"
    return None


def kernels(network: nn.Module) -> set[str]:
    """What computes the attention in a network now: `sdpa`, `xformers`, a backend's name, or a processor's class."""
    return {name for module in _attention(network) if (name := _kernel(module.processor)) is not None}


def _kernel(processor: Any) -> str | None:
    name = type(processor).__name__
    if hasattr(processor, "_attention_backend"):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        backend = getattr(backend, "value", backend)
        return {v: k for k, v in BACKENDS.items()}.get(backend, backend)
    if "Linear" in name or "Multiscale" in name:
        return None  # no softmax, no kernel
    if "XFormers" in name:
        return "xformers"
    return "sdpa" if name.endswith("2_0") else name


def _attention(network: nn.Module) -> Iterator[Any]:
    return (module for module in network.modules() if getattr(module, "processor", None) is not None)


def _set(network: nn.Module, kernel: str) -> None:
    from diffusers.models import attention_processor
    from diffusers.models.attention_dispatch import attention_backend

    modules = list(_attention(network))
    if any(hasattr(module.processor, "_attention_backend") for module in modules):
        try:
            with attention_backend():  # the setter would leave its kernel as that of every other network, too
                network.set_attention_backend(BACKENDS[kernel])  # type: ignore[operator]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"attention {kernel}: {reason(error)}") from error
    for module in modules:
        swap = CLASSES[kernel].get(type(module.processor).__name__)
        if swap is not None:
            module.set_processor(getattr(attention_processor, swap)())
