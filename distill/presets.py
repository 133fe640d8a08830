"""The distribution matching family: one config of interchangeable parts; a method is a preset, its own defaults.

`docs/methods/distribution_matching.md` says what each part is. Imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from fewstep.distill.regression_config import RegressionConfig, RegressionMetric
from fewstep.distill.train_config import TrainConfig, above

Divergence = Literal["reverse_kl", "huber_kl", "sid", "sim", "f_distill", "uni_instruct"]
Explicit = ("reverse_kl", "huber_kl", "f_distill")
"""Divergences whose direction on the sample needs no graph through teacher and fake score."""
OfRatio = ("f_distill", "uni_instruct")
"""Divergences that weigh a sample by its density ratio, which a discriminator tells."""
Discriminator = Literal["heads", "mean"]
Weight = Literal["mean_gap", "alpha", "alpha_sigma", "none"]
Policy = Literal["backward_simulation", "noised_data", "trajectory", "phases"]
Noisy = ("trajectory", "phases")
"""Policies that compare samples at a level above 0."""
FakeScoreWeight = Literal["output", "epsilon", "alpha_epsilon"]


class DistributionMatchingConfig(RegressionConfig, TrainConfig, frozen=True):
    """A divergence, a step policy, the guidance of each score, a rhythm, a regulariser or none."""

    parts: int = Field(1, ge=1, description="of the prompts, a student of its own for each")

    divergence: Divergence = Field("reverse_kl", description="what drives the student's sample")
    weight: Weight = Field("mean_gap", description="of the divergence")
    sid_alpha: float = Field(1.0, description="alpha of SiD; 0.5 is half the Fisher divergence's gradient, 1 is SIM's")
    distance: Literal["pseudo_huber", "squared", "power"] = Field("pseudo_huber", description="of the scores in SIM")
    huber_c: float = Field(
        1e-3, gt=0, description="of sim's distance, huber_kl and pseudo_huber, in units of an element"
    )
    distance_power: float = Field(1.0, gt=0, description="exponent of distance: power")
    f: Literal["rkl", "kl", "jf", "js", "sf", "pearson", "neyman", "sh"] = Field(
        "js", description="of f_distill and uni_instruct"
    )
    exact_divergence: bool = Field(False, description="all terms of uni_instruct's gradient, or the published form")
    split_gradient: bool = Field(True, description="one network's graph at a time, for one more call of the fake score")

    policy: Policy = Field(
        "backward_simulation",
        description="the student's inputs: its own rollout, real latents noised, or its own ODE steps, each compared "
        "where it ends",
    )
    phases: int = Field(
        2,
        ge=2,
        description="policy phases, of a teacher with one network: how many, with a LoRA and an even share of steps",
    )
    phase_order: Literal["sequential", "alternating"] = Field(
        "sequential", description="policy phases: one after the other, an equal share of the run each, or in turns"
    )
    steps: list[PositiveInt] = Field(
        [4], min_length=1, description="step counts trained; one is drawn in each iteration"
    )
    start: Literal["noise", "level"] = Field(
        "noise", description="first input: what pipelines start from, or sigma z at init_level"
    )
    init_level: float | None = Field(
        None, gt=0, le=1, description="of the first call; default: 1, for start: level where sigma / alpha is 2.5"
    )
    min_level: float = Field(0.02, ge=0, lt=1, description="of the levels where scores are compared")
    max_level: float = Field(0.98, gt=0, le=1, validate_default=True)
    level_margin: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="policies trajectory and phases: least distance of the levels from where the step ends",
    )
    weighting_scheme: Literal["none", "logit_normal"] = Field("none", description="of the levels; none: uniform")
    logit_mean: float = Field(0.0, description="of the logit of the level")
    logit_std: float = Field(1.0, gt=0)

    guidance_scale: float = Field(7.5, description="of the teacher's score; 1 = none")
    guidance_scale_max: float | None = Field(
        None, description="with it the teacher's scale is drawn from guidance_scale..this for each sample"
    )
    fake_guidance_scale: float = Field(1.0, description="of the fake score in the student's loss")
    fake_train_guidance_scale: float = Field(1.0, description="of the fake score while it is trained")
    prompt_dropout: float = Field(0.0, ge=0, lt=1, description="share of prompts emptied before the student samples")

    gan_weight: float = Field(0.0, ge=0, description="of the GAN's loss in the student's, per sample; 0 = no GAN")
    discriminator_weight: float = Field(0.01, gt=0, description="of the discriminator's loss in the fake score's")
    discriminator: Discriminator = Field(
        "heads", description="on the fake score's features: heads of its own at own levels (DMD2), or their mean (SiD)"
    )
    feature_blocks: list[str] | None = Field(None, min_length=1, description="read by it; default: the family's")
    gan_warmup_steps: int = Field(0, ge=0, description="iterations before the student feels the discriminator")

    fake_score_updates: int = Field(5, ge=1, description="fake score updates per student update")
    fake_score_warmup_steps: int = Field(0, ge=0, description="iterations of the fake score alone")
    fake_score_learning_rate: float | None = Field(None, gt=0, description="default: the student's")
    fake_score_weight: FakeScoreWeight = Field(
        "output", description="of its loss: on the raw output, a VP's v counted as epsilon, or alpha times that error"
    )
    fake_score_target: Literal["exact", "x0_hat"] = Field(
        "exact", description="at samples that keep noise: the exact one, or TDM's published regression, which is biased"
    )
    fake_score_prompt_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of prompts emptied for the fake score's training alone"
    )

    @model_validator(mode="after")
    def _fake_score_is_the_students(self) -> DistributionMatchingConfig:
        used, trained = self.fake_guidance_scale, self.fake_train_guidance_scale
        if self.divergence in ("sim", "uni_instruct") and used != trained:
            raise ValueError(
                f"fake_guidance_scale {used:g} must be fake_train_guidance_scale {trained:g} for divergence "
                f"{self.divergence}, whose F - x0 needs the student's own denoiser; sid takes two"
            )
        return self

    @model_validator(mode="after")
    def _noisy_points(self) -> DistributionMatchingConfig:
        """What compares samples that keep noise can be had only in part."""
        if self.policy not in Noisy:
            if self.fake_score_target == "x0_hat":
                raise ValueError("fake_score_target x0_hat is of policy trajectory; clean samples have one target")
            return self
        if self.divergence not in ("reverse_kl", "huber_kl") or self.gan_weight > 0:
            what = f"divergence {self.divergence}" if self.gan_weight == 0 else "a GAN (gan_weight above 0)"
            raise ValueError(
                f"policy {self.policy} compares samples that keep noise, {what} clean ones; it takes divergence "
                "reverse_kl or huber_kl, and gan_weight 0"
            )
        if self.policy == "phases" and len(self.steps) > 1:
            raise ValueError(
                f"policy phases trains one step count, got steps {self.steps}: the phases are those of its levels"
            )
        for count in self.steps:
            self._levels_left(count)
        return self

    def _levels_left(self, count: int) -> None:
        top = self.init_level or 1.0
        for i in range(count):
            start, to = top * (1 - i / count), top * (1 - (i + 1) / count)
            low, high = max(self.min_level, to + self.level_margin), min(self.max_level, start)
            if low >= high:
                raise ValueError(
                    f"no level is left to compare scores in step {i + 1} of {count}, from {start:.4g} to {to:.4g}: "
                    f"min_level {self.min_level:g}, max_level {self.max_level:g}, level_margin {self.level_margin:g}"
                )

    @model_validator(mode="after")
    def _pairs_of_one_step(self) -> DistributionMatchingConfig:
        if self.regression_weight > 0 and (self.policy in Noisy or 1 not in self.steps):
            raise ValueError(
                "regression_weight: compares what the student's one step makes of a noise; it takes 1 among steps, now "
                f"{self.steps}, and policy backward_simulation or noised_data, now {self.policy}"
            )
        return self

    @property
    def discriminates(self) -> bool:
        """Whether the fake score carries a discriminator, which needs images."""
        return self.gan_weight > 0 or self.divergence in OfRatio

    @property
    def own_gan_levels(self) -> bool:
        """Whether it looks at noised samples of its own; a ratio is needed where the scores are compared."""
        return self.discriminator == "heads" and self.divergence not in OfRatio

    @field_validator("max_level")
    @classmethod
    def _above(cls, value: float, info: ValidationInfo) -> float | None:
        return above(value, info, "min_level")

    @field_validator("guidance_scale_max")
    @classmethod
    def _wider(cls, value: float | None, info: ValidationInfo) -> float | None:
        return above(value, info, "guidance_scale")


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
    prompt_dropout: float = Field(0.1, ge=0, lt=1)
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
