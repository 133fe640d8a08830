"""Intermediate activations of a network, read by forward hooks, without computing what comes after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fewstep.samplers.errors import UserError


class _Reached(Exception):
    """Every block asked for has run."""


@contextmanager
def captured(network: nn.Module, blocks: Sequence[str], stop: bool = False) -> Iterator[dict[str, Any]]:
    """Within the block, what the named blocks of a network return in its next call, with its graph.

    Args:
        network: a bare module, not a view with an adapter.
        blocks: names as in `network.named_modules()`, such as `mid_block` or `transformer_blocks.3`.
        stop: leave the block as soon as all have returned, so that nothing after the deepest is computed. A sharded
            network (FSDP) runs to its end all the same: left halfway it would not free what it gathered.

    Yields:
        a dict by name, which the call fills.

    Raises:
        UserError: for a name that the network does not have, with those it has, and for a block that did not run.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = isinstance(network, FSDPModule)
    stop = stop and not sharded
    modules = {name: _block(network, name) for name in blocks}
    outputs: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output
        if stop and len(outputs) == len(modules):
            raise _Reached

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    if sharded:
        # weights are gathered again where a gradient comes in by what the network returns: let that be the features, too
        handles.append(network.register_forward_hook(lambda module, args, output: (output, outputs), prepend=True))
        handles.append(network.register_forward_hook(lambda module, args, output: output[0]))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would not see the hooks
            yield outputs
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in outputs]
    if missing:
        raise UserError(f"{type(network).__name__}: {', '.join(missing)} did not run, so it has no features")


def quarters(blocks: Sequence[nn.Module], name: str) -> tuple[str, ...]:
    """Names of the last block of each quarter of a list: 4, 9, 14, 19 of 20 (SANA-Sprint reads 2, 8, 14, 19)."""
    last = {-(-len(blocks) * quarter // 4) - 1: None for quarter in (1, 2, 3, 4)}
    return tuple(f"{name}.{i}" for i in last)


def _block(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        parts = ", ".join(_outline(network))
        raise UserError(
            f"{type(network).__name__} has no block {name!r}; it has {parts}, and what is in them"
        ) from None


def _outline(network: nn.Module) -> Iterator[str]:
    """Names of the network's parts, and of the entries of those that are lists."""
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList):
            yield from (f"{name}.{i}" for i in range(len(module)))
        else:
            yield name
