"""What a diffusers network needs to be differentiated forwards (Jacobian-vector products)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.samplers.errors import UserError, reason

KERNELS = ("XFormers", "Flash", "NPU")
"""Part of the names of diffusers' attention processors that call a kernel from outside torch themselves."""

UNKNOWN = ("forward AD", "functorch transforms", "jvp function")
"""Part of what torch says where an operation has no forward-mode derivative."""


@contextmanager
def forward_mode(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block torch's forward-mode derivatives go through these networks, in float32.

    Attention runs as plain matrix products: flash, memory-efficient, cuDNN and the CPU's default have no forward-mode
    derivative, and kernels from outside torch may lose it without a word. Attention backends that diffusers dispatches
    are switched and put back; so are gradient checkpointing, whose recomputation knows no tangents, and autocast.

    Args:
        networks: bare modules, not views with an adapter.

    Raises:
        UserError: for an attention processor that calls such a kernel itself, for weights below float32, and for an
            operation without a forward-mode derivative.
    """
    with ExitStack() as stack:
        for network in networks:
            _prepare(network, stack)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see these changes
        try:
            yield
        except RuntimeError as error:
            if not any(part in str(error) for part in UNKNOWN):
                raise
            raise UserError(f"no forward-mode derivative: {reason(error)}") from error


def _prepare(network: nn.Module, stack: ExitStack) -> None:
    name = type(network).__name__
    low = {p.dtype for p in network.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if low:
        raise UserError(f"{name}: forward-mode derivatives drown in the rounding of {low.pop()}; load it in float32")
    for device in {p.device.type for p in network.parameters()}:
        stack.enter_context(torch.autocast(device, enabled=False))
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if any(kernel in type(processor).__name__ for kernel in KERNELS):
            raise UserError(
                f"{name}: {type(processor).__name__} has no forward-mode derivative; call set_default_attn_processor()"
            )
        if hasattr(processor, "_attention_backend"):
            _set(stack, processor, "_attention_backend", "native")
        if getattr(module, "gradient_checkpointing", False):
            _set(stack, module, "gradient_checkpointing", False)
        if isinstance(module, nn.GroupNorm):
            stack.callback(module.register_forward_pre_hook(_contiguous).remove)


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack unwinds."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # torch's derivative of group norm views its input, which fails where channels come last in memory
    return (args[0].contiguous(), *args[1:])
