"""The noise process of a diffusers scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import Discrete, Flow, NoiseProcess, TrigFlow


def from_config(config: Mapping[str, Any], sequence_length: int | None = None) -> NoiseProcess:
    """The noise process of a diffusers scheduler config.

    Args:
        config: `scheduler.config`, with or without `_class_name`.
        sequence_length: number of image tokens, needed where the shift is dynamic.

    Raises:
        UserError: for a scheduler that is none of these, naming it.
    """
    name = config.get("_class_name", "")
    if name == "SCMScheduler":
        return TrigFlow()
    if name.startswith("EDM"):
        raise UserError(f"scheduler {name}: it scales the network's inputs and outputs, which is not supported")
    if is_flow(name, config):
        return Flow(_shift_factor(config, sequence_length), config.get("num_train_timesteps", 1000))
    if "beta_schedule" in config:
        if config.get("thresholding"):
            raise UserError(f"{name}: dynamic thresholding is not supported; set thresholding to false")
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
        return Discrete(_alphas_cumprod(config), config.get("prediction_type", "epsilon"), clip)
    raise UserError(f"scheduler {name or dict(config)}: no noise process known for it; known: DDPM-like, flow, SCM")


def from_scheduler(scheduler: Any, sequence_length: int | None = None) -> NoiseProcess:
    """`from_config` of a scheduler in memory, whose config names its class only if it was loaded from a file."""
    return from_config({**scheduler.config, "_class_name": type(scheduler).__name__}, sequence_length)


def shift_of(name: str, config: Mapping[str, Any]) -> float:
    """The constant shift of a flow scheduler's levels: a class has one of two keys for it, and keeps another's as it came."""
    own, other = ("shift", "flow_shift") if "FlowM" in name else ("flow_shift", "shift")
    return config.get(own) or config.get(other) or 1.0


def is_flow(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this class and config runs on the levels of a flow."""
    return "Flow" in name or config.get("prediction_type") == "flow_prediction"


def _shift_factor(config: Mapping[str, Any], sequence_length: int | None) -> float:
    if not config.get("use_dynamic_shifting"):
        return shift_of(config.get("_class_name", ""), config)
    if sequence_length is None:
        raise UserError("the scheduler's shift depends on the resolution: pass the number of image tokens")
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (sequence_length - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The table that diffusers itself computes for these betas, in its own float32."""
    from diffusers import DDPMScheduler  # who knows every schedule of betas

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    try:
        return DDPMScheduler(**{k: config[k] for k in keys if k in config}).alphas_cumprod
    except NotImplementedError as error:
        raise UserError(f"scheduler: beta_schedule {config['beta_schedule']}: unknown to diffusers") from error
