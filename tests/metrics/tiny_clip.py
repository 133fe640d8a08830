"""A random open_clip model, small enough for a test, in a folder as open_clip's hub models are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewstep.samplers.compat import declare_torchvision_operators

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
"""Nobody's defaults, so that what ignores them differs."""


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write the configuration and random weights; the folder."""
    declare_torchvision_operators()
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**json.loads(json.dumps(CONFIG)))
    with torch.no_grad():  # at their usual start the features of any two images, and of any two prompts, are near
        for name, weight in model.named_parameters():
            if name.endswith(("attn.in_proj_weight", "attn.out_proj.weight")):
                weight.mul_(8)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    described = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def noise_images(n: int, height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    """Images (n, 3, height, width) uint8 that are not all alike: blocks of random colours under noise."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (n, 3, 3, 4), generator=generator).float()
    grain = 20 * torch.randn(n, 3, height, width, generator=generator)
    return (torch.nn.functional.interpolate(blocks, (height, width)) + grain).clamp(0, 255).to(torch.uint8)
