"""Keys of a config about data. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator


def not_unicode(text: str) -> str | None:
    """What is wrong with a text that holds half a character, as JSON, YAML and a terminal can; tokenizers take none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is no valid Unicode, at character {error.start + 1}"
    return "holds a null character" if "\0" in text else None


def _unicode(text: str) -> str:
    if said := not_unicode(text):
        raise ValueError(said)
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""What tokenizers take."""


def _home(text: str) -> str:
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no such user: {Path(text).parts[0]}") from error
    return text


Folder = Annotated[Text, AfterValidator(_home)]
"""Where something is written; ~ is the home of a user that there is."""


class DataConfig(BaseModel, frozen=True):
    """What a run trains on, and in which sizes; spelt as in diffusers' and kohya's scripts."""

    train_data: str | None = Field(
        None,
        description="images, or for a teacher of clips these, with captions: a folder, .tar shards (a path, pattern or "
        "folder), or embedded:NAME",
    )
    dataset_name: str | None = Field(
        None, description="or a data set of the package datasets: a folder of save_to_disk, or a name"
    )
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    image_column: str = Field("image", description="of dataset_name")
    video_column: str = Field("video", description="of dataset_name, for a teacher of clips")
    caption_column: str = Field("text", description="of dataset_name, of metadata.jsonl, of .json files in shards")
    prompts: str | None = Field(
        None,
        description="instead of images or clips with captions: a text file, one prompt a line, a table of captions, or "
        "embedded:NAME",
    )
    negative_prompt: Text = ""
    num_samples: int = Field(8000, ge=1, description="size of an embedded data set")
    resolution: int | None = Field(None, ge=8, description="height and width at once; with buckets their area's root")
    height: int | None = Field(None, ge=8, validate_default=True)
    width: int | None = Field(None, ge=8, validate_default=True)
    num_frames: int | None = Field(None, ge=1)
    clip_fps: float | None = Field(None, gt=0, description="of clips, frames a second taken; default: the teacher's")
    aspect_ratio_buckets: bool | list[tuple[int, int]] = Field(
        False, description="true, or sizes 'height,width;height,width': each image goes to the nearest shape"
    )
    bucket_reso_steps: int = Field(64, ge=1, description="sides of buckets are multiples of it")
    min_bucket_reso: int | None = Field(
        None, ge=8, description="shortest side of a bucket; default: half the resolution"
    )
    max_bucket_reso: int | None = Field(
        None, ge=8, description="longest side of a bucket; default: twice the resolution"
    )
    cache_dir: Folder | None = Field(None, description="cached latents and embeddings; default ~/.cache/fewstep")

    @property
    def has_images(self) -> bool:
        """Whether images or clips with captions are given."""
        return self.train_data is not None or self.dataset_name is not None

    @field_validator("dataset_name")
    @classmethod
    def _one_source(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None and info.data.get("train_data") is not None:
            raise ValueError("give train_data or dataset_name, not both")
        return name

    @field_validator("prompts")
    @classmethod
    def _one_list(cls, prompts: str | None, info: ValidationInfo) -> str | None:
        given = next((k for k in ("train_data", "dataset_name") if info.data.get(k) is not None), None)
        if prompts is not None and given is not None:
            raise ValueError(f"{given} has captions of its own, which the run learns from; set one of them to null")
        return prompts

    @field_validator("max_bucket_reso")
    @classmethod
    def _longest(cls, side: int | None, info: ValidationInfo) -> int | None:
        if side is not None and side < (info.data.get("min_bucket_reso") or 0):
            raise ValueError(f"must be at least min_bucket_reso {info.data['min_bucket_reso']}")
        return side

    @field_validator("height", "width")
    @classmethod
    def _square(cls, side: int | None, info: ValidationInfo) -> int | None:
        resolution = info.data.get("resolution")
        if side is not None and resolution not in (None, side):
            raise ValueError(f"give resolution (now {resolution}), or height and width, not both")
        return side if resolution is None else resolution

    @field_validator("aspect_ratio_buckets", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return [(int(h), int(w)) for h, w in (size.split(",") for size in value.split(";") if size.strip())]
        except ValueError as error:
            raise ValueError("must be true, false, or sizes as 'height,width;height,width'") from error

    @field_validator("aspect_ratio_buckets")
    @classmethod
    def _some(cls, value: bool | list[tuple[int, int]]) -> bool | list[tuple[int, int]]:
        if isinstance(value, list) and (not value or any(side < 8 for size in value for side in size)):
            raise ValueError("must name one size at least, of 8 pixels or more")
        return value
