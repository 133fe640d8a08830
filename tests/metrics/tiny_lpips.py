"""Random weights of an LPIPS backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.samplers.compat import declare_torchvision_operators


def backbone(name: str) -> torch.nn.Sequential:
    """Layers of torchvision's network of that name, random and the same on every call."""
    declare_torchvision_operators()
    import torchvision

    with torch.device("meta"):
        layers = getattr(torchvision.models, name)().features
    layers.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in layers.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.05
        torch.nn.init.normal_(p, std=1.4 * scale, generator=generator)
    return layers.eval()


def state(layers: torch.nn.Sequential) -> dict[str, Tensor]:
    """As in torchvision's files."""
    return {f"features.{k}": v for k, v in layers.state_dict().items()}


def squeeze() -> dict[str, Tensor]:
    """The smallest, 5 MB."""
    return state(backbone("squeezenet1_1"))
