"""What a run needs in memory, before anything loads: a table of what could be done, and what fits."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fewstep.distill.config import ConfigError, TrainConfig
from fewstep.distill.console import columns
from fewstep.distill.distiller import Distiller
from fewstep.distill.memory import Need, base_bytes, bytes_of, need, without_adapters
from fewstep.samplers.adapters import bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import DTYPES
from fewstep.samplers.skeleton import skeleton

GIB = 2**30
FREE = 0.2
"""Of a device, for what no count has: measured peaks are up to 1.22 of the predicted ones (benchmarks/memory.md)."""
UNITS = {"gib": 2**30, "g": 2**30, "": 2**30, "mib": 2**20, "m": 2**20, "gb": 10**9, "mb": 10**6}
NOTE = (
    "activations: the tensors that autograd keeps of one call of the student at this batch size, by their shapes, times "
    "the rows with a graph that the method's losses hold (an upper bound); with checkpointing the inputs of all blocks and "
    "the inside of the largest; attention by a fused kernel. Buffers of kernels and the allocator's rounding come on top: "
    "a fifth of the device is kept free for them: what needs more than four fifths and no more than all is tight, and may run "
    "out of memory. With FSDP the whole base lies on each device before it is cut, and the total is no less"
)


def kinds(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What the roles could be, and the keys that say so."""
    full = {"student": "full"}
    if "fake_score" not in type(config).model_fields:
        return {"LoRA on a shared base": {"student": "lora"}, "full copies": full}
    return {
        "LoRA on a shared base": {"student": "lora"},
        "full copies": full | {"fake_score": None},
        "full student, LoRA fake score": full | {"fake_score": "lora"},
    }


def strategies(config: TrainConfig, devices: int) -> Iterator[tuple[str, str, TrainConfig, bool, int]]:
    """Kind, name below it, config, checkpointing, devices: what could be done, each with the config's other settings."""
    bf16 = {"base_dtype": "bf16", "quantization_config": None}
    for kind, keys in kinds(config).items():
        lora = keys["student"] == "lora"
        asked = config.model_copy(update=keys if lora else keys | {"quantization_config": None})
        yield kind, "", asked, False, 1
        yield kind, "checkpointing", asked, True, 1
        if lora:
            yield kind, "checkpointing, base bf16", asked.model_copy(update=bf16), True, 1
            nf4 = bf16 | {"quantization_config": "nf4"}
            yield kind, "checkpointing, base nf4", asked.model_copy(update=nf4), True, 1
        # what shards can be cut of
        whole = asked.model_copy(update={"base_dtype": "fp32", "quantization_config": None})
        yield kind, f"checkpointing, FSDP over {devices}", whole, True, devices


def plan(config: TrainConfig, memory: str | None = None, devices: int = 8) -> str:
    """A table of strategies, what fits, and how activations are estimated.

    Args:
        config: the run's.
        memory: of one device, e.g. `24GiB`; default: that of this machine's GPU, if it has one.
        devices: that the sharded rows count with.

    Raises:
        UserError, ConfigError: what is wrong, in one line.
    """
    from fewstep.distill.run import methods_distiller, networks_of

    limit = limit_of(memory)
    if devices < 2:
        raise ConfigError(f"--devices {devices}: of the sharded rows; must be 2 or more")
    base = skeleton(config.teacher, config.revision)
    base = base.at(base.latent_shape(config.height, config.width, config.num_frames))
    found: dict[str, tuple[Need | str, TrainConfig, bool, int]] = {}
    made: dict[str, Distiller | str] = {}
    known: dict[Any, int] = {}
    for kind, keys in kinds(config).items():
        asked = config.model_copy(update=keys)
        # adapters are added to it
        own = base.with_networks({n: copy.deepcopy(bare(m)) for n, m in base.networks.items()})
        try:
            made[kind] = methods_distiller(asked, networks_of(asked, own))
        except UserError as error:
            made[kind] = str(error)
    if all(isinstance(method, str) for method in made.values()):
        raise UserError(str(made["LoRA on a shared base"]))
    for kind, name, asked, checkpointing, over in strategies(config, devices):
        method = made[kind]
        row = method if isinstance(method, str) else need(asked, method, base, checkpointing, over, known=known)
        found[f"{kind}, {name}" if name else kind] = (row, asked, checkpointing, over)
    return _text(config, base, found, limit, made)


def _text(config: TrainConfig, base: Denoiser, found: dict[str, Any], limit: int | None, made: dict[str, Any]) -> str:

    def beside(asked: TrainConfig) -> int:
        """Text encoders and autoencoder, which stays in float32."""
        width, parts = DTYPES[asked.base_dtype].itemsize, base.pipeline.components.items()
        others = {n: bytes_of(m) for n, m in parts if isinstance(m, nn.Module) and n not in base.networks}
        return sum(size if name == "vae" else size * width // 4 for name, size in others.items())

    def loaded(asked: TrainConfig) -> int:
        """These and the networks are on the device together before the training, while prompts and images are encoded."""
        return base_bytes(asked, base) + beside(asked)

    def fit(row: Need, asked: TrainConfig) -> str:
        training = row.total + (0 if asked.offload_encoders else beside(asked))
        return fits(max(training, loaded(asked)), limit or 0)

    table = [["strategy", "weights", "gradients", "optimiser", "activations", "total", *(["fits"] if limit else [])]]
    for name, (row, asked, *_) in found.items():
        if isinstance(row, str):
            continue
        cells = [row.weights, row.gradients, row.optimizer, row.activations, row.total]
        table.append([name, *map(_gib, cells), *([fit(row, asked)] if limit else [])])
    count = sum(without_adapters(bare(n)) for n in base.networks.values())
    trained = [["trained role", *made]]
    for role in next(method for method in made.values() if not isinstance(method, str)).roles():
        sizes = [_size(method, role) for method in made.values()]
        if any(s != "-" for s in sizes):
            trained.append([role, *sizes])
    lines = [
        f"{type(base.pipeline).__name__}: {count:,} parameters in {' and '.join(base.networks)}, batch "
        f"{config.train_batch_size}, latents {'x'.join(map(str, base.latent_shape(config.height, config.width, config.num_frames)))}",
        "",
        columns(trained),
        "",
        columns(table) + "\n(GiB on each device)",
        "",
    ]
    lines += [f"{kind}: {why}" for kind, why in made.items() if isinstance(why, str)]
    own = next(
        (name for name, (row, asked, ck, over) in found.items()
         if over == 1 and asked.model_dump() == config.model_dump() and ck == config.gradient_checkpointing), None,
    )  # fmt: skip
    if limit:
        held: dict[str, list[str]] = {"yes": [], "tight": [], "no": []}
        for name, (row, asked, *_) in found.items():
            if not isinstance(row, str):
                held[fit(row, asked)].append(name)
        lines.append(f"{_gib(limit)} GiB hold: {'; '.join(held['yes']) or 'none of these'}")
        if held["tight"]:
            lines.append(f"{_gib(limit)} GiB hold tightly: {'; '.join(held['tight'])}")
    if own is not None and not isinstance(found[own][0], str):
        row, asked = found[own][:2]
        verdicts = {"yes": ", which fits", "tight": ", which is tight", "no": ", which does not fit"}
        lines.append(f"this config: {own}, {_gib(row.total)} GiB{verdicts[fit(row, asked)] if limit else ''}")
    lines.append(
        f"before it trains: {_gib(loaded(config))} GiB, the networks beside text encoder and autoencoder, which encode"
        + ("" if config.offload_encoders else " and, with offload_encoders: false, stay there")
    )
    lines.append(NOTE)
    return "\n".join(lines)


def _size(method: Any, role: str) -> str:
    if isinstance(method, str) or role not in method.roles() or not method.roles()[role].trained:
        return "-"
    return f"{sum(p.numel() for p in method.roles()[role].parameters.values()):,}"


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}" if n < 100 * GIB else f"{n / GIB:.0f}"


def fits(most: int, limit: int) -> str:
    """Whether so many bytes at the worst moment fit a device: `yes` with `FREE` to spare, `tight` without, `no`."""
    return "no" if most > limit else "tight" if most > (1 - FREE) * limit else "yes"


def limit_of(memory: str | None) -> int | None:
    """Bytes of `24GiB`, `24` or `80GB`; of None the GPU's, if there is one."""
    if memory is None:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", memory.lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--memory {memory}: not an amount of memory such as 24GiB")
    return int(float(match[1]) * UNITS[match[2]])
