"""Presets of the distribution matching family: a method is its parts' config (`family_config.py`) with defaults of its own.

Imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from fewstep.distill.family_config import (
    Discriminator,
    DistributionMatchingConfig,
    Divergence,
    FakeScoreWeight,
    Policy,
    Weight,
)
from fewstep.distill.regression_config import RegressionMetric
from fewstep.distill.train_config import TrainConfig


class DMDConfig(DistributionMatchingConfig, frozen=True):
    """The first DMD: one step, held in place by a regression to the teacher's own samples (arXiv:2311.18828)."""

    method: Literal["dmd"]
    steps: list[PositiveInt] = Field([1], min_length=1)
    fake_score_updates: int = Field(1, ge=1)
    regression_weight: float = Field(0.25, ge=0)
    regression_metric: RegressionMetric = "lpips"


class DMD2Config(DistributionMatchingConfig, frozen=True):
    """Distribution matching distillation, data-free, by backward simulation (arXiv:2311.18828, 2405.14867)."""

    method: Literal["dmd2"]


class SiDConfig(DistributionMatchingConfig, frozen=True):
    """Score identity distillation in one step, guided long and short (arXiv:2404.04057, 2406.01561)."""

    method: Literal["sid"]
    divergence: Divergence = "sid"
    steps: list[PositiveInt] = Field([1], min_length=1)
    start: Literal["noise", "level"] = "level"
    guidance_scale: float = 1.5
    fake_guidance_scale: float = 1.5
    fake_train_guidance_scale: float = 1.5
    fake_score_prompt_dropout: float = Field(0.1, ge=0, lt=1)
    fake_score_updates: int = Field(1, ge=1)
    fake_score_warmup_steps: int = Field(200, ge=0)
    fake_score_weight: FakeScoreWeight = "epsilon"
    adam_beta1: float = Field(0.0, ge=0, lt=1)


class SiDFewStepConfig(SiDConfig, frozen=True):
    """Few-step score identity distillation: the uniform mixture of all steps' outputs (arXiv:2505.12674)."""

    method: Literal["sid_fewstep"]  # type: ignore[assignment]
    steps: list[PositiveInt] = Field([4], min_length=1)
    guidance_scale: float = 4.5
    fake_guidance_scale: float = 4.5
    fake_train_guidance_scale: float = 4.5


class SwiftBrushConfig(DistributionMatchingConfig, frozen=True):
    """Variational score distillation in one step: both scores guided, no normaliser (arXiv:2312.05239)."""

    method: Literal["swiftbrush"]
    weight: Weight = "alpha_sigma"
    steps: list[PositiveInt] = Field([1], min_length=1)
    guidance_scale: float = 4.5
    fake_guidance_scale: float = 4.5
    fake_score_updates: int = Field(1, ge=1)
    fake_score_weight: FakeScoreWeight = "alpha_epsilon"
    fake_score_prompt_dropout: float = Field(0.1, ge=0, lt=1)


class SIMConfig(DistributionMatchingConfig, frozen=True):
    """Score implicit matching in one step: any distance between scores (arXiv:2410.16794)."""

    method: Literal["sim"]
    divergence: Divergence = "sim"
    weight: Weight = "none"
    steps: list[PositiveInt] = Field([1], min_length=1)
    start: Literal["noise", "level"] = "level"
    guidance_scale: float = 4.5
    fake_score_updates: int = Field(1, ge=1)
    fake_score_warmup_steps: int = Field(200, ge=0)
    fake_score_weight: FakeScoreWeight = "epsilon"
    adam_beta1: float = Field(0.0, ge=0, lt=1)


class UniInstructConfig(DistributionMatchingConfig, frozen=True):
    """An f-divergence expanded along the noise, in one step, with a discriminator's ratio (arXiv:2505.20755)."""

    method: Literal["uni_instruct"]
    divergence: Divergence = "uni_instruct"
    steps: list[PositiveInt] = Field([1], min_length=1)
    start: Literal["noise", "level"] = "level"
    guidance_scale: float = 1.0
    gan_weight: float = Field(1e-4, ge=0)
    discriminator: Discriminator = "mean"
    discriminator_weight: float = Field(0.5, gt=0)
    gan_warmup_steps: int = Field(800, ge=0)
    fake_score_updates: int = Field(1, ge=1)
    fake_score_warmup_steps: int = Field(400, ge=0)
    fake_score_weight: FakeScoreWeight = "epsilon"
    adam_beta1: float = Field(0.0, ge=0, lt=1)


class TDMConfig(DistributionMatchingConfig, frozen=True):
    """Trajectory distribution matching: each step's end has the teacher's law at its level (arXiv:2503.06674)."""

    method: Literal["tdm"]
    divergence: Divergence = "huber_kl"
    policy: Policy = "trajectory"
    guidance_scale: float = 4.5
    fake_score_updates: int = Field(1, ge=1)
    adam_beta1: float = Field(0.0, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)


class PhasedDMDConfig(DistributionMatchingConfig, frozen=True):
    """DMD in subintervals of the noise levels, a network of the teacher or a LoRA for each (arXiv:2510.27684)."""

    step_range = range(2, 5)  # a phase has a step at least
    method: Literal["phased_dmd"]
    policy: Policy = "phases"
    guidance_scale: float = 4.0
    adam_beta1: float = Field(0.0, ge=0, lt=1)
    adam_weight_decay: float = Field(0.01, ge=0)


PRESETS: dict[str, type[TrainConfig]] = {
    "dmd": DMDConfig,
    "dmd2": DMD2Config,
    "phased_dmd": PhasedDMDConfig,
    "sid": SiDConfig,
    "sid_fewstep": SiDFewStepConfig,
    "sim": SIMConfig,
    "swiftbrush": SwiftBrushConfig,
    "tdm": TDMConfig,
    "uni_instruct": UniInstructConfig,
}
"""Config of each method of the family."""
