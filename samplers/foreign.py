"""Students that others published: LoRAs in any format that diffusers reads, added into a pipeline's weights, and networks alone,
in diffusers' own keys, that take the place of the pipeline's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.samplers import single_file
from fewstep.samplers.errors import UserError, one_line
from fewstep.samplers.hub import file_of, is_hub_id


def arguments(lora: str) -> tuple[str, dict[str, str], float | None]:
    """Folder or hub id of a `LORA` or `LORA*SCALE`, its file, and the scale if one is said; UserError where there can be none."""
    scale = None
    if "*" in lora and not Path(lora).exists():
        lora, _, text = lora.rpartition("*")
        try:
            scale = float(text)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(f"{lora}*{text}: the scale of a LoRA must be a number, as in {lora}*0.125")
    if not Path(lora).is_dir():
        single_file.refuse_pickle(lora, lora)
    at, file = lora, {}
    if lora.endswith(".safetensors"):
        at, file = str(Path(lora).parent), {"weight_name": Path(lora).name}
    if not Path(lora).exists() and not is_hub_id(at):
        raise UserError(f"{lora}: no such LoRA: a .safetensors file, a folder, ORG/NAME or ORG/NAME/FILE.safetensors")
    return at, file, scale


def add(pipeline: Any, lora: str, networks: Mapping[str, nn.Module], first: bool = True) -> None:
    """Add a LoRA into a pipeline's weights, or put those of a network alone in their place.

    Args:
        pipeline: whose.
        lora: a LoRA or a network, as `arguments` takes it.
        networks: of the pipeline, those that predict, by name.
        first: nothing was added before.
    """
    name = type(pipeline).__name__
    at, file, scale = arguments(lora)
    if file and _replaced(name, lora, _place(at, **file), scale, networks, first):
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{lora}: a {name} takes no LoRA")
    with one_line(f"{lora}: cannot be loaded as a LoRA of {name}"):
        with quiet():
            pipeline.load_lora_weights(at, use_safetensors=True, **file)
        adapted = list(pipeline.get_list_adapters())
        if adapted:
            fuse(pipeline, adapted, 1.0 if scale is None else scale)
    if not adapted:
        raise UserError(f"{lora}: names no layer of {name}")


def _place(at: str, weight_name: str) -> str:
    """Where a file lies on this disk, fetched from the hub if need be."""
    path = Path(at) / weight_name
    return str(path) if path.exists() else file_of(at, weight_name)


def _replaced(
    pipeline: str, lora: str, place: str, scale: float | None, networks: Mapping[str, nn.Module], first: bool
) -> bool:
    """Whether a file holds a network of the pipeline alone, and its weights are now the network's; UserError for another's."""
    from safetensors.torch import load_file

    found = single_file.tensors(place)
    kin = {name: own for name, network in networks.items() if found.keys() & (own := network.state_dict()).keys()}
    if not kin:
        return False
    if len(kin) > 1:
        raise UserError(f"{lora}: one network, of {' or '.join(kin)} of {pipeline}? put it into a pipeline folder")
    (part, own), *_ = kin.items()
    said = f"{lora}: not the {part} of this {pipeline}"
    for what, keys in (("lacks", own.keys() - found.keys()), ("has beside its own", found.keys() - own.keys())):
        if keys:
            raise UserError(f"{said}: {what} {len(keys)} weights, e.g. {min(keys)}")
    for key, value in own.items():
        if found[key].shape != value.shape:
            sizes = ("x".join(map(str, tensor.shape)) for tensor in (found[key], value))
            raise UserError(f"{said}: {key} is {' and not '.join(sizes)}")
    if scale is not None:
        raise UserError(
            f"{lora}: a whole {part}, of which no part can be added; leave the *{lora.rpartition('*')[2]} out"
        )
    if not first:
        raise UserError(f"{lora}: a whole {part}, which would undo what stands before it; name it first, and once")
    networks[part].load_state_dict(load_file(place))
    return True


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
