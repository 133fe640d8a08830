"""What a run trains on: prompts, or images or clips with captions.

A data set is a list of samples with an `image(i)` and a `caption(i, u)`, where u is a uniform draw: a sample may have
several captions. Captions are few and shared, so a data set lists them once. Images come in one size, or in buckets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.distill import clips, pictures
from fewstep.distill.buckets import make_buckets, nearest
from fewstep.distill.captions import read_captions
from fewstep.distill.config import ConfigError, TrainConfig
from fewstep.distill.files import source
from fewstep.distill.methods import distiller
from fewstep.distill.pictures import Unusable, fitted, picture, size_ids
from fewstep.distill.sources import Source, some
from fewstep.samplers.errors import UserError

CAPTION_LEVELS = (0.40, 0.35, 0.10)
"""Shares of full, category and category-alone captions of an embedded picture; the rest have none."""


class DataSet(Protocol):
    """Samples with captions, and images where they have some."""

    captions: list[str]
    has_images: bool
    buckets: list[tuple[int, int]]
    """Sizes (height, width) that its images come in; none where the run's own size is the only one."""
    bucket_of: list[int]
    """Which of them each sample is of."""

    def __len__(self) -> int: ...

    def caption(self, i: int, u: float) -> int:
        """Index into `captions` for sample i and a uniform draw u in [0, 1)."""
        ...

    def image(self, i: int) -> Tensor:
        """(3, H, W) in 0..1, or a clip (F, 3, H, W), in the size of its bucket; Unusable where there is none."""
        ...

    def sizes(self, i: int) -> list[int]:
        """What SDXL is told: original height, width; top, left of the crop once resized; height, width."""
        ...

    def content(self, i: int) -> str:
        """A text that names an image's or a clip's content, for caches."""
        ...


class Prompts:
    """Prompts alone."""

    has_images = False

    def __init__(self, captions: Sequence[str]):
        self.captions = list(captions)
        self.buckets: list[tuple[int, int]] = []
        self.bucket_of = [0] * len(self.captions)

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, i: int, u: float) -> int:
        return i

    def image(self, i: int) -> Tensor:
        raise UserError("this data set has prompts only")

    def sizes(self, i: int) -> list[int]:
        raise UserError("this data set has prompts only")

    def content(self, i: int) -> str:
        return self.captions[i]


class EmojiImages:
    """Compositions of the embedded drawings, `compositions(n, seed)`, captions at four levels of detail."""

    has_images = True

    def __init__(self, n: int, seed: int):
        from fewstep.metrics.emoji import drawings

        self._render = drawings.render
        self.compositions = drawings.compositions(n, seed)
        self.captions = [""]
        index = {"": 0}
        self._choices: list[tuple[int, ...]] = []
        for c in self.compositions:
            choice = []
            for caption in (*drawings.captions(c.drawing, c.color), ""):
                if caption not in index:
                    index[caption] = len(self.captions)
                    self.captions.append(caption)
                choice.append(index[caption])
            self._choices.append(tuple(choice))
        self._edges = np.cumsum(CAPTION_LEVELS)
        self._drawn: str | None = None
        self.buckets, self.bucket_of = [(drawings.SIDE, drawings.SIDE)], [0] * n

    def __len__(self) -> int:
        return len(self.compositions)

    def caption(self, i: int, u: float) -> int:
        return self._choices[i][int(np.searchsorted(self._edges, u, side="right"))]

    def image(self, i: int) -> Tensor:
        return torch.from_numpy(self._render(self.compositions[i])).permute(2, 0, 1).float() / 255

    def sizes(self, i: int) -> list[int]:
        return [*self.buckets[0], 0, 0, *self.buckets[0]]

    def content(self, i: int) -> str:
        if self._drawn is None:  # a new sheet or another rendering shows in the first pictures
            pictures = [self._render(c).tobytes() for c in self.compositions[:256]]
            self._drawn = sha256(b"".join(pictures)).hexdigest()
        return json.dumps([self._drawn, self.compositions[i]])


class EmojiPrompts(EmojiImages):
    """The captions of `EmojiImages` without the images."""

    has_images = False


class Images:
    """Images of a source, each in the bucket whose shape is nearest to its own.

    Args:
        source: files and captions.
        buckets: sizes (height, width); where there is only one, no image is opened before it is needed.

    Raises:
        UserError: with several buckets, images that cannot be opened, with their number and the first names.
    """

    has_images = True
    kind: Any = pictures
    """The module that reads its files."""

    def __init__(self, source: Source, buckets: Sequence[tuple[int, int]]):
        self.source, self.buckets = source, list(buckets)
        index: dict[str, int] = {}
        self._choices = [tuple(index.setdefault(text, len(index)) for text in texts) for texts in source.texts]
        self.captions = list(index)
        self._seen: dict[int, tuple[str, int, int]] = {}
        self.bucket_of = [0] * len(source.names)
        if len(self.buckets) > 1:
            faults = []
            for i in range(len(self)):
                try:
                    self.bucket_of[i] = nearest(self.buckets, *self._look(i)[1:])
                except Unusable as error:
                    faults.append(str(error))
            refuse_unusable(faults, len(self))

    def __len__(self) -> int:
        return len(self.source.names)

    def caption(self, i: int, u: float) -> int:
        choices = self._choices[i]
        return choices[int(u * len(choices))]

    def image(self, i: int) -> Tensor:
        name = self.source.names[i]
        return fitted(picture(self.source.read(i), name), self.buckets[self.bucket_of[i]], name)

    def sizes(self, i: int) -> list[int]:
        _, height, width = self._look(i)
        return size_ids((height, width), self.buckets[self.bucket_of[i]])

    def content(self, i: int) -> str:
        return self._look(i)[0]

    def _look(self, i: int) -> tuple[str, int, int]:
        """Hash of the file, height and width of the upright image; a file is read for them once."""
        if i not in self._seen:
            data = self.source.read(i)
            self._seen[i] = sha256(data).hexdigest(), *self.kind.upright_size(data, self.source.names[i])
        return self._seen[i]


class Clips(Images):
    """Clips of a source, in one size or in buckets.

    Args:
        source: files and captions.
        buckets: as those of images.
        frames: how many of a clip are taken, from its beginning.
        rate: at how many a second.
    """

    kind = clips

    def __init__(self, source: Source, buckets: Sequence[tuple[int, int]], frames: int, rate: float):
        super().__init__(source, buckets)
        self.frames, self.rate = frames, rate

    def image(self, i: int) -> Tensor:
        size, name = self.buckets[self.bucket_of[i]], self.source.names[i]
        return clips.clip(self.source.read(i), name, size, self.frames, self.rate)

    def sizes(self, i: int) -> list[int]:
        size = self.buckets[self.bucket_of[i]]
        return [*size, 0, 0, *size]  # no teacher of clips is told: no file is opened for it

    def content(self, i: int) -> str:
        return f"{sha256(self.source.read(i)).hexdigest()} {self.frames} {self.rate:g}"


def refuse_unusable(faults: Sequence[str], of: int, what: str = "images") -> None:
    """UserError that counts and names the images or clips that cannot be used, if there are any."""
    if faults:
        raise UserError(f"train_data: {len(faults)} of {of} {what} cannot be used: {some(faults)}")


def data_set(
    config: TrainConfig,
    pixels: tuple[int, int],
    frames: tuple[int, float] | None = None,
    files: Source | None = None,
) -> DataSet:
    """The data set of a config: `train_data` or `dataset_name` where one is given, otherwise `prompts`.

    Args:
        config: the run's.
        pixels: height and width of its samples.
        frames: of a teacher of clips, their number and how many a second; see `Denoiser.frames`.
        files: what `files.source` gave for the config.
    """
    if config.train_data == "embedded:emoji":
        if "images" in distiller(config.method).needs_of(config) and (
            pixels != (64, 64) or config.aspect_ratio_buckets
        ):
            what = (
                "in one size" if pixels == (64, 64) else f"at 64x64 pixels, and this run is at {pixels[0]}x{pixels[1]}"
            )
            raise ConfigError(f"config: train_data: embedded:emoji is drawn {what}")
        return EmojiImages(config.num_samples, config.seed)
    if files is not None:
        sizes = buckets(config, pixels)
        return Images(files, sizes) if frames is None else Clips(files, sizes, frames[0], config.clip_fps or frames[1])
    if config.prompts == "embedded:emoji":
        return EmojiPrompts(config.num_samples, config.seed)
    return Prompts(read_captions(config.prompts or ""))


def captions(config: TrainConfig) -> list[str]:
    """The captions of a config's images or clips, or its prompts; no file is opened for more."""
    files = source(config)
    if files is not None:
        return list(dict.fromkeys(text for texts in files.texts for text in texts))
    return data_set(config, (64, 64)).captions


def buckets(config: TrainConfig, pixels: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes (height, width) of a config's images."""
    if isinstance(config.aspect_ratio_buckets, list):
        return list(config.aspect_ratio_buckets)
    if not config.aspect_ratio_buckets:
        return [pixels]
    return make_buckets(*pixels, config.bucket_reso_steps, config.min_bucket_reso, config.max_bucket_reso)
