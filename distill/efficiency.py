"""How networks run: precision of what is frozen, attention, checkpointing, compilation, memory format, the optimiser.

Nothing here changes what is trained; each part is diffusers' or torch's own, refused in one line where it cannot run.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Role
from fewstep.samplers import single_file
from fewstep.samplers.adapters import bare, checkpointed
from fewstep.samplers.attention import kernels, use_attention, why_not
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError, reason
from fewstep.samplers.load import DTYPES, dtypes, index_of, load, parts, resolve
from fewstep.samplers.manifest import holds_lora

if TYPE_CHECKING:
    from accelerate import Accelerator

LOWER = {"fp16": torch.float16, "bf16": torch.bfloat16}
VARIANTS = 64
"""Compiled forms of one network: each adapter, with and without gradients, each batch size."""
KEPT = {-1: 2**30, -3: 2**25}
"""glibc's `mallopt`: bytes at the top of the heap that stay with the process (M_TRIM_THRESHOLD), and the largest block that
comes from there (M_MMAP_THRESHOLD, whose most this is)."""


def keep_freed_memory(device: torch.device) -> bool:
    """On CPUs what an iteration frees stays with the process for the next one; whether that could be asked for.

    Else glibc gives it back and the system fills it with zeros again, each time: a tenth of an iteration of full
    students of the embedded teacher. The peak of memory is the same; other C libraries are left alone.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in KEPT.items())


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision for forwards; accelerate's own takes the environment apart on each call."""
    if mixed_precision not in LOWER:
        return nullcontext()
    # no cache: before torch 2.10 a cast made without graph (a student's sample) was used again without gradients
    return torch.autocast(device.type, LOWER[mixed_precision], cache_enabled=False)


def refuse(config: TrainConfig) -> None:
    """UserError, before any weight loads, for what cannot run on this machine."""
    if config.use_8bit_adam:
        _bitsandbytes("use_8bit_adam", "leave it out for torch's AdamW")
    if config.quantization_config is not None:
        _bitsandbytes("quantization_config", "base_dtype: bf16 halves the base without it")
    if config.compile:
        try:
            torch.compile(lambda x: 2 * x + 1)(torch.ones(4, device="cuda" if torch.cuda.is_available() else "cpu"))
        except Exception as error:  # no C++ compiler, no Triton: each says so in its own kinds
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(
                f"compile: torch.compile fails here ({lines[0] if lines else type(error).__name__})"
            ) from error


def refuse_here(config: TrainConfig, accelerator: Accelerator, networks: Callable[[], Iterable[nn.Module]]) -> None:
    """UserError for what this device, or the teacher's networks, cannot do.

    Args:
        config: the run's.
        accelerator: knows the device.
        networks: makes the networks, weights or not; called only where a key depends on them.
    """
    if config.mixed_precision == "fp16" and accelerator.scaler is None:
        # accelerate would train in float32 without a word
        raise UserError("mixed_precision fp16: needs a GPU; on this device use bf16 or no")
    if (config.base_dtype, config.mixed_precision, accelerator.device.type) == ("fp16", "bf16", "cpu"):
        raise UserError(
            "base_dtype fp16: beside mixed_precision: bf16 it needs a GPU; on this device use base_dtype: bf16"
        )
    kernel = config.attention not in ("auto", "sdpa")
    if not (kernel or config.channels_last or config.gradient_checkpointing):
        return
    found = list(networks())
    trained = DTYPES[config.base_dtype] if config.student == "lora" else torch.float32
    dtype = LOWER.get(config.mixed_precision, trained)
    if kernel and (no := why_not(found, config.attention, accelerator.device, dtype)) is not None:
        raise UserError(f"attention {config.attention}: {no}; attention: sdpa runs everywhere")
    for network in found:
        if config.channels_last:
            _convolutional(network)
        if config.gradient_checkpointing and not getattr(network, "_supports_gradient_checkpointing", False):
            raise UserError(f"gradient_checkpointing: {type(network).__name__} does not support it; leave it out")


def _bitsandbytes(key: str, instead: str) -> Any:
    try:
        package = importlib.import_module("bitsandbytes")
    except ImportError:
        raise UserError(f"{key}: needs bitsandbytes; pip install bitsandbytes, or {instead}") from None
    if not torch.cuda.is_available():
        raise UserError(f"{key}: bitsandbytes needs a GPU; {instead}")
    return package


def loading(config: TrainConfig, networks: Iterable[str]) -> dict[str, Any]:
    """Arguments of the teacher's `from_pretrained`: types of its weights, and the quantisation of its networks."""
    arguments, dtype = dtypes(config.base_dtype), DTYPES[config.base_dtype]
    if config.quantization_config is not None:
        from diffusers import PipelineQuantizationConfig

        four = config.quantization_config == "nf4"
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        arguments["quantization_config"] = PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit" if four else "bitsandbytes_8bit",
            quant_kwargs={"load_in_4bit": True, **nf4} if four else {"load_in_8bit": True},
            components_to_quantize=list(networks),
        )
    return arguments


def unquantised(config: TrainConfig, family: type[Denoiser]) -> Denoiser:
    """The teacher's networks as its files have them, in bfloat16 on the CPU, without its encoders and its autoencoder."""
    others: dict[str, None] = {}
    plain = single_file.split(config.teacher) is None and not parts(config.teacher)[1]
    if plain and not holds_lora(resolve(config.teacher)):
        modules = single_file.modules(index_of(config.teacher, config.revision))
        others = {name: None for name in modules if name not in family.network_names}
    return load(config.teacher, config.revision, config.variant, torch_dtype=torch.bfloat16, **others)


def cast_base(config: TrainConfig, teacher: Denoiser) -> None:
    """What `loading` asks of files, of a teacher that is in memory already."""
    if config.quantization_config is not None:
        raise UserError("quantization_config: weights are quantised while they load; name the teacher by its source")
    if config.base_dtype != "fp32":
        for name, component in teacher.pipeline.components.items():
            if isinstance(component, nn.Module) and name != "vae":
                component.to(DTYPES[config.base_dtype])


def apply(config: TrainConfig, roles: dict[str, Role], device: torch.device) -> list[str]:
    """Set every network of the roles as the config says; lines to say.

    To be called when all roles are made: copies take neither compiled code nor a guidance input's new network along.
    """
    networks = {id(m): m for role in roles.values() for n in role.denoiser.networks.values() if (m := bare(n))}
    dtype = LOWER.get(config.mixed_precision) or roles["student"].denoiser.network.dtype
    said = [use_attention(networks.values(), config.attention, device, dtype)]
    for network in networks.values():
        if config.channels_last:
            channels_last(network)
        if config.gradient_checkpointing:
            checkpointed(network)
        if config.compile:
            compiled(network)
    return said


def proven(config: TrainConfig, roles: dict[str, Role], ask: Callable[[Denoiser], Any]) -> list[str]:
    """Ask the student once where its attention is another kernel than torch's; lines to say.

    A trial of the kernel alone does not see what a network gives it: under autocast the norms of queries and keys of Flux,
    Wan and SD 3.5 give float32 beside values of half precision, which xformers and flash-attn refuse.

    Raises:
        UserError: the kernel fails there; of `attention: auto` torch's own takes its place instead.
    """
    student = roles["student"].denoiser
    networks = [bare(n) for role in roles.values() for n in role.denoiser.networks.values()]
    if not (used := set.union(*map(kernels, networks)) - {"sdpa"}):
        return []
    try:
        with torch.no_grad(), autocast(config.mixed_precision, student.device):
            ask(student)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # each kernel has its own
        said = f"{', '.join(sorted(used))} fails in {type(networks[0]).__name__}: {reason(error)}"
        if config.attention != "auto":
            raise UserError(f"attention {config.attention}: {said}; attention: sdpa runs everywhere") from error
        use_attention(networks, "sdpa", student.device, student.network.dtype)
        return [f"attention: sdpa ({said})"]
    return []


def channels_last(network: nn.Module) -> None:
    """Channels last in memory, which convolutions of half precision on GPUs are faster with; same results.

    UserError for a network without 2D convolutions beside the one that cuts patches.
    """
    _convolutional(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _convolutional(network: nn.Module) -> None:
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != m.stride]
    if len(layers) < 2:
        raise UserError(f"channels_last: {type(network).__name__} is no network of 2D convolutions; leave it out")


def compiled(network: nn.Module, backend: str = "inductor") -> None:
    """Compile a network in place; a switch of its adapter is another compiled form, not a wrong one."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    network.compile(backend=backend)


def optimizer(config: TrainConfig, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW, on a GPU with all weights in one kernel, or bitsandbytes' with moments of 8 bits."""
    c = config
    settings = {"betas": (c.adam_beta1, c.adam_beta2), "eps": c.adam_epsilon, "weight_decay": c.adam_weight_decay}
    if c.use_8bit_adam:
        adam = _bitsandbytes("use_8bit_adam", "leave it out for torch's AdamW").optim.AdamW8bit
        return cast(torch.optim.Optimizer, adam(parameters, rate, **settings))
    # torch's fused kernel decides by itself whether to skip a step of the fp16 scaler, which then could not be counted
    fused = True if parameters[0].is_cuda and c.mixed_precision != "fp16" else None
    return torch.optim.AdamW(parameters, rate, fused=fused, **settings)
