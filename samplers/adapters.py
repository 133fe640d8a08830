"""LoRA adapters on a network that several roles share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Adapted:
    """A shared network seen with one of its adapters, or with none (the base)."""

    def __init__(self, module: nn.Module, adapter: str | None):
        self.module = module
        self.adapter = adapter
        self.dtype = getattr(module, "dtype", None)  # of the base; to find it diffusers walks all layers: 2 ms

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        activate(self.module, self.adapter)
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def activate(module: nn.Module, adapter: str | None) -> None:
    """Make `adapter` the active one, or disable all; nothing else changes.

    peft's own `set_adapter` also flips `requires_grad`: between a student's forward and its backward it would
    silently drop the student's gradients.
    """
    if getattr(module, "_fewstep_active", ()) == adapter:
        return
    if not hasattr(module, "_fewstep_layers"):
        adapters_added(module)
    for layer in module._fewstep_layers:  # type: ignore[union-attr]
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    module._fewstep_active = adapter  # type: ignore[assignment]


def adapters_added(module: nn.Module) -> None:
    """To be called when a network got an adapter: which of its layers carry one, so that a switch need not search."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    module._fewstep_layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]  # type: ignore[assignment]
    module._fewstep_active = ()  # type: ignore[assignment]


def bare(network: Any) -> nn.Module:
    """The module behind a view with an adapter."""
    return network.module if isinstance(network, Adapted) else network


def checkpointed(network: nn.Module) -> None:
    """diffusers' gradient checkpointing, with the adapter of the forward active again while it is computed once more.

    By then another role was asked: diffusers' own function would compute with that one's adapter.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _active(network, getattr(network, "_fewstep_active", ()))

    def run(block: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiled form has its adapter, and such contexts cannot be compiled
            return checkpoint(block, *args, use_reentrant=False)
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    network.enable_gradient_checkpointing(run)  # type: ignore[operator]


@contextmanager
def _active(network: nn.Module, adapter: Any) -> Iterator[None]:
    """Within the block that adapter is active; () where none was ever chosen."""
    before: Any = getattr(network, "_fewstep_active", ())
    if adapter != ():
        activate(network, adapter)
    try:
        yield
    finally:
        if before != ():
            activate(network, before)
