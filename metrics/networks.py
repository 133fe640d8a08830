"""What the networks that judge share: images in, float32 out, one line where weights are missing, names that tell."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn


def check_images(images: Tensor, what: str = "images") -> None:
    """Refuse what is not (N, 3, H, W) uint8 with ValueError."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"{what} must be (N, 3, H, W) uint8; got {tuple(images.shape)} {images.dtype}")


@torch.no_grad()
def in_batches(network: Callable[..., Tensor], batch: int, *inputs: Tensor) -> Tensor:
    """Outputs for inputs (N, ...) that are seen `batch` rows at a time, (N, ...) float32 on the CPU."""
    return torch.cat([network(*rows).float().cpu() for rows in zip(*(x.split(batch) for x in inputs), strict=True)])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of (N, D) with the same row of the other, (N,) in -1..1. NaN where a vector is 0."""
    return (a / a.norm(dim=-1, keepdim=True) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)


def fingerprint(network: nn.Module, prepared: object) -> str:
    """Eight hexadecimal digits that tell local networks of one file name apart.

    Of the shape of every weight and 64 evenly spaced values of it (all of a large file would take seconds), and of how
    images are prepared, as its `str` says.
    """
    digest = hashlib.sha256(str(prepared).encode())
    for name, weight in network.state_dict().items():
        some = weight.flatten()[:: max(1, weight.numel() // 64)]
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def read_weights(path: str | Path, what: str, otherwise: str) -> dict[str, Tensor]:
    """State dict of a .safetensors or torch file, on the CPU.

    Args:
        path: the file.
        what: begins the error's line, e.g. "lpips".
        otherwise: ends it: how the file is got.

    Raises:
        ValueError: no such file, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{what}: no file {path}; {otherwise}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, SafetensorError) as error:
        raise ValueError(f"{what}: {path} is not a file of weights; {otherwise}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{what}: {path} holds no state dict; {otherwise}")
    return state
