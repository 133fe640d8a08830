"""LoRAs that others made, in any format that diffusers reads: found, added into a pipeline's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.samplers.errors import UserError, one_line
from fewstep.samplers.hub import is_hub_id


def arguments(lora: str) -> tuple[str, dict[str, str], float]:
    """Folder or hub id of a `LORA` or `LORA*SCALE`, its file, and the scale; UserError where there can be none."""
    scale = 1.0
    if "*" in lora and not Path(lora).exists():
        lora, _, text = lora.rpartition("*")
        try:
            scale = float(text)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(f"{lora}*{text}: the scale of a LoRA must be a number, as in {lora}*0.125")
    at, file = lora, {}
    if lora.endswith(".safetensors"):
        at, file = str(Path(lora).parent), {"weight_name": Path(lora).name}
    if not Path(lora).exists() and not is_hub_id(at):
        raise UserError(f"{lora}: no such LoRA: a .safetensors file, a folder, ORG/NAME or ORG/NAME/FILE.safetensors")
    return at, file, scale


def add(pipeline: Any, lora: str) -> None:
    """Add a LoRA into a pipeline's weights."""
    name = type(pipeline).__name__
    at, file, scale = arguments(lora)
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{lora}: a {name} takes no LoRA")
    with one_line(f"{lora}: cannot be loaded as a LoRA of {name}"):
        with quiet():
            pipeline.load_lora_weights(at, use_safetensors=True, **file)
        adapted = list(pipeline.get_list_adapters())
        if adapted:
            fuse(pipeline, adapted, scale)
    if not adapted:
        raise UserError(f"{lora}: names no layer of {name}")


def fuse(pipeline: Any, components: list[str], scale: float = 1.0) -> None:
    """Add the adapters of components, times `scale`, into their weights."""
    pipeline.fuse_lora(components=components, lora_scale=scale)
    pipeline.unload_lora_weights()


@contextmanager
def quiet() -> Iterator[None]:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
