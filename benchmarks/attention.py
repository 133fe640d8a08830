"""Seconds of attention forwards and backwards, by the kernels that run on this machine.

    python benchmarks/attention.py [--repeat 5] [--markdown FILE]

Shapes are of one self-attention: the embedded teacher's, Stable Diffusion 1.5's highest at 512 pixels, and on a GPU also
Flux's at 1024. Kernels: torch's plain products (`math`, what training takes on CPUs), torch's choice (`sdpa`), xformers and
flash-attn where they pass their trial. Prints the medians, and why a kernel is not there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.samplers.attention import FUNCTIONS, trial

SHAPES = {  # batch, tokens, heads, channels a head
    "embedded teacher, 8x8, batch 16": (16, 64, 4, 32),
    "SD 1.5, 64x64, batch 1": (1, 4096, 8, 40),
    "Flux, 64x64 and text, batch 1": (1, 4608, 24, 128),
}


def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's, on (B, tokens, heads, channels)."""
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def seconds(attend: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> float:
    """One forward and backward; on a CPU of its own time, so that other work beside it does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    attend(q, k, v).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    """Time every kernel at every shape."""
    parser = argparse.ArgumentParser(description="Attention forwards and backwards.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    a = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    shapes = SHAPES if gpu else dict(list(SHAPES.items())[:2])
    kernels: dict[str, tuple[Callable[..., Tensor], bool]] = {"math": (native, True), "sdpa": (native, False)}
    absent = []
    for name, (module, function) in FUNCTIONS.items():
        why = trial(name, {shape[-1] for shape in shapes.values()}, device, dtype) if gpu else "needs a GPU"
        if why is None:
            kernels[name] = (getattr(import_module(module), function), False)
        else:
            absent.append(f"{name}: {why}")
    lines = [f"| shape | {' | '.join(f'{name}, ms' for name in kernels)} |", "|---|" + "---|" * len(kernels)]
    for label, shape in shapes.items():
        cells = []
        for attend, plain in kernels.values():
            with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
                seconds(attend, shape, device, dtype)
                median = statistics.median(seconds(attend, shape, device, dtype) for _ in range(a.repeat))
            cells.append(f"{1000 * median:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    text = "\n".join([*lines, "", f"{where}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}", *absent])
    if a.markdown is not None:
        a.markdown.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
