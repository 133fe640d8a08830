"""What sampling costs on this machine: seconds and peak memory of a batch, and the rows that went through the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fewstep.app.store import Cost
from fewstep.distill.evaluation import Sampler
from fewstep.samplers.baseline import counted


def measured(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Cost]:
    """Images of one batch, uint8, and its cost from prompts to pixels."""
    _forget_peak()
    with counted(sampler.networks) as rows:
        began = time.perf_counter()
        images = sampler.images(prompts, seeds)
        seconds = time.perf_counter() - began
    return (images * 255).round().to(torch.uint8), Cost(len(images), seconds, sum(rows), _peak())


def at_batch_sizes(
    sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], sizes: Sequence[int], times: int = 3
) -> list[Cost]:
    """Costs of batches of other sizes, after one of each that is not counted; prompts are repeated where they are few."""
    found = []
    for size in sizes:
        some = [i % len(prompts) for i in range(size)]
        runs = [measured(sampler, [prompts[i] for i in some], [seeds[i] for i in some])[1] for _ in range(times + 1)]
        found += runs[1:]
    return found


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak resident size starts anew


def _peak() -> int | None:
    """Peak bytes since `_forget_peak`: of the GPU's tensors, or else of the process; None where nothing tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
