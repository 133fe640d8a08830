"""How much people like an image: heads on CLIP features, HPSv2, ImageReward.

The LAION heads are small files that read CLIP's image features. HPSv2 and ImageReward come with packages of their own,
which bring old versions of others; they are used when installed and are no requirement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.metrics.networks import check_images, read_weights

PUBLISHED = (
    "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth",
)
"""LAION's heads on ViT-L/14 of OpenAI: version 1, one linear layer, and version 2, five."""
HPS = "hf download xswu/HPSv2 HPS_v2.1_compressed.pt; hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
REWARD = (
    "hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir ~/.cache/ImageReward; "
    "hf download bert-base-uncased"
)
"""What brings the weights that the two packages would download."""
LAYERS = (0, 2, 4, 6, 7)
"""Places of version 2's linear layers in its file; between them stood dropout, and no activation."""


def load_head(path: str | Path, device: str | torch.device = "cpu") -> nn.Sequential:
    """LAION's aesthetic head from its file, in evaluation mode; the kind is read from the file.

    Version 1 (`sa_0_4_vit_*_linear.pth`) holds `weight` (1, D) and `bias`, version 2 (`sac+logos+ava1-l14-linearMSE.pth`)
    `layers.N` for the N of `LAYERS`.

    Raises:
        ValueError: no such file, or neither of the two formats.
    """
    state = read_weights(path, "aesthetic", f"run: curl -LO {PUBLISHED[1]}, or {PUBLISHED[0]}")
    prefixes = [""] if "weight" in state else [f"layers.{n}." for n in LAYERS]
    if set(state) != {prefix + kind for prefix in prefixes for kind in ("weight", "bias")}:
        raise ValueError(
            f"aesthetic: {path} holds neither weight and bias nor layers.0, 2, 4, 6, 7; it holds {', '.join(state)}"
        )
    head = nn.Sequential()
    for prefix in prefixes:
        weight, bias = state[prefix + "weight"].float(), state[prefix + "bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        head.append(layer)
    return head.to(device).eval().requires_grad_(False)


def aesthetic(features: Tensor, head: nn.Sequential) -> Tensor:
    """Aesthetic score of each image, about 1..10, (N,) float32.

    Args:
        features: (N, D) of the CLIP model that the head was trained on, which the `Clip` of that model gives; of any
            length, since the head reads unit vectors.
        head: `load_head(path)`.
    """
    first = head[0]
    assert isinstance(first, nn.Linear)
    if features.ndim != 2 or features.shape[1] != first.in_features:
        raise ValueError(
            f"aesthetic: the head reads {first.in_features} features, as of ViT-L-14 openai; got {tuple(features.shape)}"
        )
    return head(F.normalize(features.float(), dim=-1).to(first.weight.device))[:, 0].cpu()


def hps(images: Tensor, prompts: Sequence[str], scorer: Any = None) -> Tensor:
    """Human preference score of each image for its own prompt (HPSv2, arXiv:2306.09341), (N,), about 0.2..0.35.

    Args:
        images: (N, 3, H, W) uint8.
        prompts: of the images.
        scorer: what `load_hps` returned, to load once for many batches.
    """
    _check(images, prompts)
    package = load_hps() if scorer is None else scorer
    model, prepare = package.model_dict["model"], package.model_dict["preprocess_val"]
    pictures = torch.stack([prepare(_picture(image)) for image in images]).to(package.device)
    words = package.get_tokenizer("ViT-H-14")(list(prompts)).to(package.device)
    with torch.no_grad(), torch.autocast("cuda", enabled=package.device == "cuda"):
        found = model(pictures, words)
    return (found["image_features"].float() * found["text_features"].float()).sum(1).cpu()


def load_hps(weights: str | Path | None = None, version: str = "v2.1") -> Any:
    """The package hpsv2 with its network loaded; its own `score` would read the checkpoint for every prompt.

    Args:
        weights: its checkpoint; None: its download.
        version: of the checkpoint that it downloads.

    Raises:
        ValueError: weights or the package are not here.
    """
    package = installed("hpsv2.img_score", "hpsv2", "hps")
    with weights_of("hps", HPS):
        package.initialize_model()
        path = weights or package.huggingface_hub.hf_hub_download("xswu/HPSv2", package.hps_version_map[version])
        state = torch.load(path, map_location=package.device, weights_only=True)["state_dict"]
    package.model_dict["model"].load_state_dict(state)
    package.model_dict["model"].to(package.device).eval()
    return package


def image_reward(images: Tensor, prompts: Sequence[str], model: Any = "ImageReward-v1.0") -> Tensor:
    """ImageReward of each image for its own prompt (arXiv:2304.05977), (N,), about -2..2.

    Args:
        images: (N, 3, H, W) uint8.
        prompts: of the images.
        model: a name or checkpoint for the package, or what its `load` returned, to load once for many batches.
    """
    _check(images, prompts)
    if isinstance(model, str):
        model = load_reward(model)
    with torch.no_grad():
        rewards = [model.score(prompt, _picture(x)) for prompt, x in zip(prompts, images, strict=True)]
    return torch.tensor(rewards, dtype=torch.float32)


def load_reward(name: str = "ImageReward-v1.0") -> Any:
    """ImageReward's network by its package. Raises ValueError where its weights or the package are not here."""
    package = installed("ImageReward", "image-reward", "image_reward")
    with weights_of("image_reward", REWARD):
        return package.load(name)


@contextmanager
def weights_of(metric: str, command: str) -> Iterator[None]:
    """What a package raises that finds no weights (errors of files, the hub and requests), as ValueError of one line."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{metric}: the weights cannot be had ({reason}); run: {command}") from error


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    check_images(images)
    if len(images) != len(prompts):
        raise ValueError(f"needs one prompt for each image; got {len(images)} images and {len(prompts)} prompts")


def installed(module: str, distribution: str, metric: str) -> Any:
    """A module of an optional package; ValueError, with the command that installs it, where it is absent."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{metric}: needs the package {distribution} ({error}); run: pip install {distribution}"
        ) from error


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
