"""The embedded judge: a small CLIP-like pair of encoders for the pictures and captions of `drawings`.

Trained by `fewstep.distill.teachers.judge` on pictures that no teacher sees (other seeds). Its Frechet distance is
called `fd_emoji` and its score `clip_emoji`: neither is comparable with FID or CLIP score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.metrics.emoji.drawings import CATEGORIES, COLORS, NAMES, background_caption

WEIGHTS = Path(__file__).parent / "assets" / "judge.safetensors"
FEATURES = 128
"""Dimensions of the features that the Frechet distance compares; few, since its bias grows with them."""
EMBEDDING = 64
START, PADDING = "<start>", "<padding>"
LENGTH = 12
"""Words of the longest caption, and the start."""


def _words() -> tuple[str, ...]:
    text = " ".join((*NAMES, *CATEGORIES, *map(background_caption, range(len(COLORS)))))
    return (PADDING, START, *sorted({"a", "an", *text.split()}))


WORDS: tuple[str, ...] = _words()


def _down(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    """3x3 convolution that halves the side, normalised over the batch: absolute colours must survive."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class ImageEncoder(nn.Module):
    """Pictures (B, 3, 64, 64) in 0..1 to features (B, FEATURES): five convolutions, then the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _down(3, 32), _down(32, 64), _down(64, 96, stride=1), _down(96, FEATURES), _down(FEATURES, FEATURES)
        )
        self.projection = nn.Linear(FEATURES, EMBEDDING, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1).mean((2, 3))


class TextEncoder(nn.Module):
    """Words (B, LENGTH) int64 to embeddings (B, EMBEDDING), not normalised: a transformer of two layers."""

    def __init__(self, width: int = EMBEDDING) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) / math.sqrt(width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(self.words(words) + self.places, src_key_padding_mask=words == 0)[:, 0]


class Judge(nn.Module):
    """The two encoders and the scale of the logits that they were trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageEncoder()
        self.text = TextEncoder()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def embed_features(self, features: Tensor) -> Tensor:
        """Features (B, FEATURES) to unit vectors (B, EMBEDDING) in the space that captions share."""
        return nn.functional.normalize(self.image.projection(features), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (B, EMBEDDING); a caption that stands there twice is encoded once."""
        known = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        embedded = nn.functional.normalize(self.text(tokens(list(known))), dim=-1)
        return embedded[[known[caption] for caption in captions]]


def tokens(captions: list[str]) -> Tensor:
    """Captions to indices into `WORDS`, (B, LENGTH) int64. Raises ValueError for a word that no caption has."""
    rows = []
    for caption in captions:
        words = [START, *caption.split()]
        unknown = [word for word in words if word not in WORDS]
        if unknown or len(words) > LENGTH:
            wrong = f"the word {unknown[0]!r} of it is unknown" if unknown else f"over {LENGTH - 1} words"
            raise ValueError(f"the embedded judge cannot read the caption {caption!r}: {wrong}")
        rows.append([WORDS.index(word) for word in words] + [0] * (LENGTH - len(words)))
    return torch.tensor(rows)


def pixels(images: Tensor) -> Tensor:
    """Images (N, 3, 64, 64), uint8 or float in 0..1, to float32 in 0..1. Raises ValueError for anything else."""
    if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
        raise ValueError(f"the embedded metrics take images (N, 3, 64, 64); got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in 0..1; got {images.dtype}")
    return images.float().clamp(0, 1)


def save(judge: Judge, path: Path = WEIGHTS) -> None:
    """Write the weights as float16 with the words that they were trained for."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file(weights, path, {"words": " ".join(WORDS)})


@cache
def load(path: Path = WEIGHTS) -> Judge:
    """The trained judge, float32, in evaluation mode, on the CPU; read once."""
    judge = Judge()
    with safe_open(path, "pt") as file:
        if file.metadata()["words"] != " ".join(WORDS):
            raise ValueError(f"{path} was trained for other captions: run python -m fewstep.distill.teachers.judge")
        judge.load_state_dict({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118  not a dict
    return judge.eval().requires_grad_(False)


class Perceptual:
    """How unlike two pictures look to the judge: LPIPS (arXiv:1801.03924) with its image encoder, without learned heads.

    The five layers' features, of unit length over channels; mean squared differences over places, mean over layers. The
    last layer is what `fd_emoji` averages, so a student that was trained by this is flattered by that figure.
    """

    def __init__(self) -> None:
        self.network = copy.deepcopy(load().image)  # goes to the student's device

    def between(self, images: Tensor, others: Tensor) -> Tensor:
        """Of each pair, (N,), with the graph. Images (N, 3, 64, 64) in 0..1, values out of range are taken as they are.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:] != (3, 64, 64):
            raise ValueError(
                f"emoji_judge compares images (N, 3, 64, 64), got {tuple(images.shape)}; lpips takes others"
            )
        a, b, distances = 2 * images - 1, 2 * others - 1, []
        for layer in self.network.layers:
            a, b = layer(a), layer(b)
            unlike = nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)
            distances.append(unlike.square().sum(1).mean((1, 2)))
        return torch.stack(distances).mean(0)


@torch.no_grad()
def features(images: Tensor, batch: int = 250) -> Tensor:
    """What the Frechet distance compares, (N, FEATURES) float32, of images (N, 3, 64, 64), uint8 or float in 0..1."""
    return torch.cat([load().image(pixels(part)) for part in images.split(batch)])


@torch.no_grad()
def similarity(image_features: Tensor, captions: list[str]) -> Tensor:
    """Cosine of each picture, as features (N, FEATURES), with its own caption, (N,) in -1..1."""
    return (load().embed_features(image_features) * load().embed_captions(captions)).sum(-1)
