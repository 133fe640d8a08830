"""LoRAs that others made, in any format that diffusers reads: found, added into a pipeline's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.samplers.errors import UserError, one_line
from fewstep.samplers.hub import is_hub_id


def arguments(lora: str) -> tuple[str, dict[str, str]]:
    """Folder or hub id of a LoRA, and its file; UserError where neither can be."""
    at, file = lora, {}
    if lora.endswith(".safetensors"):
        at, file = str(Path(lora).parent), {"weight_name": Path(lora).name}
    if not Path(lora).exists() and not is_hub_id(at):
        raise UserError(f"{lora}: no such LoRA: a .safetensors file, a folder, ORG/NAME or ORG/NAME/FILE.safetensors")
    return at, file


def add(pipeline: Any, lora: str) -> None:
    """Add a LoRA into a pipeline's weights."""
    name = type(pipeline).__name__
    at, file = arguments(lora)
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{lora}: a {name} takes no LoRA")
    with one_line(f"{lora}: cannot be loaded as a LoRA of {name}"):
        with quiet():
            pipeline.load_lora_weights(at, use_safetensors=True, **file)
        adapted = list(pipeline.get_list_adapters())
        if adapted:
            fuse(pipeline, adapted)
    if not adapted:
        raise UserError(f"{lora}: names no layer of {name}")


def fuse(pipeline: Any, components: list[str]) -> None:
    """Add the adapters of components into their weights."""
    pipeline.fuse_lora(components=components)
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
