"""CLIP through open_clip: features of images and prompts, CLIP score, similarity of two images.

Any model and weights of open_clip: a name and a tag, a name and a file, a folder with open_clip_config.json, or
hf-hub:ORG/NAME. Images are prepared as the model's own transform says, one by one through PIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics.networks import check_images, cosine, fingerprint, in_batches
from fewstep.metrics.scores import mean_error
from fewstep.samplers.compat import declare_torchvision_operators


class Clip:
    """Image and text encoders; called with images it is their feature space.

    Args:
        model: a name that open_clip knows, a folder, or hf-hub:ORG/NAME.
        weights: a tag or a file; None for a folder or a hub id, which have their own. A file of OpenAI's weights wants
            a name that ends in -quickgelu; with a tag the activation follows the tag.
        device: where the encoders run.
        batch: images or prompts in one call of a network.
        unit: called with images, give unit vectors, as CMMD reads them (with ViT-L-14-336 of OpenAI).

    Raises:
        ValueError: weights that are unknown, missing or of another model, with what would supply them.
    """

    def __init__(
        self,
        model: str = "ViT-L-14",
        weights: str | None = "openai",
        device: str | torch.device = "cpu",
        batch: int = 64,
        unit: bool = False,
    ):
        self.device, self.batch, self.unit = device, batch, unit
        if Path(model).is_dir():
            model = f"local-dir:{model}"
        own = model.startswith(("local-dir:", "hf-hub:"))
        self.network, self.preprocess, self.tokenizer = _load(model, None if own else weights)
        self.network.to(device)
        parts = [model, Path(str(weights)).stem]
        if own:
            schema, where = model.split(":", 1)
            parts = [Path(where).name if schema == "local-dir" else where]
        if model.startswith("local-dir:") or (not own and Path(str(weights)).is_file()):
            parts.append(fingerprint(self.network, self.preprocess))
        self.name = "-".join(["clip", *parts, *(["unit"] if unit else [])]).replace("/", "-")

    def __call__(self, images: Tensor) -> Tensor:
        """Image features (N, D) float32 of images (N, 3, H, W) uint8; of their own length unless `unit`."""
        found = self.images(images)
        return F.normalize(found, dim=-1) if self.unit else found

    def images(self, images: Tensor) -> Tensor:
        """Image features (N, D) float32, not normalised, of images (N, 3, H, W) uint8."""
        check_images(images)
        return in_batches(lambda x: self.network.encode_image(self.pixels(x)), self.batch, images)

    def pixels(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 as the network takes them."""
        pictures = (Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy())
        return torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Text features (N, D) float32, not normalised; what exceeds the model's context is cut off."""
        tokens = self.tokenizer(list(prompts))
        return in_batches(lambda x: self.network.encode_text(x.to(self.device)), self.batch, tokens)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 cos of each image with its own prompt, (N,), for `clip_score`."""
        if len(images) != len(prompts):
            raise ValueError(f"clip score needs one prompt for each image; got {len(images)} and {len(prompts)}")
        return 100 * cosine(self.images(images), self.texts(prompts))

    def similarity(self, images: Tensor, others: Tensor) -> Tensor:
        """Cosine of each image with the other image of the same number, (N,) in -1..1."""
        if len(images) != len(others):
            raise ValueError(f"clip similarity compares pairs; got {len(images)} and {len(others)} images")
        return cosine(self.images(images), self.images(others))


def clip_score(scores: Tensor, groups: Sequence[int] | None = None) -> tuple[float, float]:
    """CLIP score of a set and its standard error (see `mean_error`), from `Clip.scores` (N,) of all of its images.

    max(100 cos, 0) (arXiv:2104.08718). As in torchmetrics the mean is what is cut at 0, not each image; trained models
    give a negative cosine to hardly any pair.
    """
    value, error = mean_error(scores, groups)
    return max(value, 0.0), error


def _load(model: str, weights: str | None) -> tuple[Any, Any, Any]:
    """Network in evaluation mode, transform of images, tokenizer."""
    declare_torchvision_operators()
    import open_clip

    tag: dict[str, Any] = {}
    if not model.startswith(("local-dir:", "hf-hub:")):
        tag = _check(model, weights)
        if tag:
            _fetch(model, str(weights), tag)
    try:
        # open_clip only warns where a tag was trained with another activation than the model's name says
        loaded: Any = open_clip.create_model_from_pretrained(
            model, weights, force_quick_gelu=bool(tag.get("quick_gelu"))
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:
        schema, _, where = model.rpartition(":")
        wanted = {
            "local-dir": "a folder needs open_clip_config.json and open_clip_model.safetensors of one model",
            "hf-hub": f"run: hf download {where}, or give the path of such a folder",
        }.get(schema, f"give weights that were trained for {model}")
        source = where if schema else f"weights {weights}"
        raise ValueError(f"clip: {source} cannot be used: {_line(error)}; {wanted}") from error
    network, preprocess = loaded
    return network.eval().requires_grad_(False), preprocess, tokenizer


def _check(model: str, weights: str | None) -> dict[str, Any]:
    """open_clip's description of a tag; empty for a file."""
    import open_clip

    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        near = ", ".join(get_close_matches(name, open_clip.list_models(), 5, 0.3))
        raise ValueError(f"clip: {model} is neither a folder nor a model of open_clip; the nearest it knows: {near}")
    tag = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    if not tag and not Path(weights or "").is_file():
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        raise ValueError(f"clip: {model} has no weights {weights}; give a file or one of: {known}")
    return tag


def _fetch(model: str, weights: str, tag: dict[str, Any]) -> None:
    """Bring the weights of a tag into the cache where open_clip will look for them."""
    import open_clip

    try:
        open_clip.download_pretrained(tag)
    except Exception as error:
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        command = f"hf download {repository} {file or '--include open_clip*'}"
        if not repository:
            command = f"curl --create-dirs -Lo ~/.cache/clip/{Path(tag['url']).name} {tag['url']}"
        raise ValueError(
            f"clip: the weights {weights} of {model} are not on this machine; run: {command}, or give a file or folder"
        ) from error


def _line(error: Exception) -> str:
    """The first line of an error, with what it names second where the first only announces a list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
