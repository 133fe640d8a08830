"""A denoiser of several networks: which rows are whose, and one call of each on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition

if TYPE_CHECKING:
    from fewstep.samplers.denoisers.base import Denoiser

Run = Callable[[Any, Tensor, Tensor, Condition], list[Tensor]]
"""What is asked of a network: `run(network, x_t, model time, condition)`, tensors with a row for each of x_t."""


def phases(denoiser: Denoiser, time: Tensor) -> dict[str, Tensor]:
    """Rows by the name of the phase that their level is in; `time` as for `Denoiser.route`."""
    names = list(denoiser.networks)
    if len(names) == 1:  # a view of one
        return {names[0]: torch.arange(len(time), device=time.device)}
    level = denoiser.noise.from_model_time(time if time.ndim == 1 else time.amax(dim=1))
    ends = denoiser.noise.shift(torch.tensor(denoiser.phase_ends, dtype=level.dtype, device=level.device))
    number = (level[:, None] <= ends + 1e-6).sum(dim=1)  # model times are rounded
    found = {name: (number == i).nonzero()[:, 0] for i, name in enumerate(names)}
    return {name: rows for name, rows in found.items() if len(rows)}


def each_network(denoiser: Denoiser, run: Run, x_t: Tensor, time: Tensor, condition: Condition) -> list[Tensor]:
    """`run` on each network's rows; the results in the order of all rows, float32 or float64."""
    sides = denoiser.sides(time)
    if denoiser.router is not None:
        sides = denoiser.router.rows(condition, list(denoiser.networks), x_t.device)
    called = list(sides)
    if denoiser.agreed is not None and len(denoiser.networks) > 1:
        needed = denoiser.agreed([name in sides for name in denoiser.networks])
        called = [name for name, by_any in zip(denoiser.networks, needed, strict=True) if by_any]
    if len(called) == 1:
        return [_full(part) for part in run(denoiser.networks[called[0]], x_t, time, condition)]
    parts, idle = [], []
    for name in called:
        network = denoiser.networks[name]
        if name in sides:
            rows = sides[name]
            parts.append(run(network, x_t[rows], time[rows], condition[rows]))
        else:  # a row that counts for nothing, but whose graph is differentiated along with the others'
            idle += run(network, x_t[:1], time[:1], condition[:1])
    order = torch.cat(list(sides.values())).argsort()
    joined = [_full(torch.cat(side))[order] for side in zip(*parts, strict=True)]
    return [part + 0 * sum(other.sum() for other in idle) for part in joined] if idle else joined


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
