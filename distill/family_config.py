"""The distribution matching family: one config of interchangeable parts; a method is a preset, its own defaults.

`docs/methods/distribution_matching.md` says what each part is. Imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from fewstep.distill.regression_config import RegressionConfig
from fewstep.distill.train_config import TrainConfig, above

Divergence = Literal["reverse_kl", "huber_kl", "sid", "sim", "f_distill", "uni_instruct"]
Explicit = ("reverse_kl", "huber_kl", "f_distill")
"""Divergences whose direction on the sample needs no graph through teacher and fake score."""
OfRatio = ("f_distill", "uni_instruct")
"""Divergences that weigh a sample by a function of its density ratio, which a discriminator tells."""
Discriminator = Literal["heads", "mean"]
DiscriminatorFeatures = Literal["fake_score", "teacher"]
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
        [4],
        min_length=1,
        description="step counts trained; one is drawn in each iteration, one given twice twice as often",
    )
    start: Literal["noise", "level"] = Field(
        "noise", description="first input: what pipelines start from, or sigma z at init_level"
    )
    init_level: float | None = Field(
        None, gt=0, le=1, description="of the first call; default: 1, for start: level where sigma / alpha is 2.5"
    )
    start_gap: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="policy trajectory: how much lower each further step count starts, by which the network knows it",
    )
    separate_levels: bool = Field(
        True,
        description="policy trajectory: a step's end is compared at the step's levels alone, or at all above where it ends",
    )
    step_conditioned: bool = Field(
        False,
        description="policy trajectory, full weights: the fake score is told which step of which count ended there",
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
    logit_mean: float = Field(0.0, description="of the logit of the level, before a flow's shift")
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
        "heads", description="on features: heads of its own at own levels (DMD2), or their mean (SiD)"
    )
    discriminator_features: DiscriminatorFeatures = Field(
        "fake_score", description="whose: the fake score's, which learns to tell, too, or the frozen teacher's (LADD)"
    )
    feature_blocks: list[str] | None = Field(None, min_length=1, description="read by it; default: the family's")
    gan_warmup_steps: int = Field(0, ge=0, description="iterations before the student feels the discriminator")

    fake_score: Literal["lora"] | None = Field(
        None, description="lora: adapters on the teacher, beside a full student; default: of the student's kind"
    )
    fake_score_updates: int = Field(5, ge=1, description="fake score updates per student update")
    fake_score_warmup_steps: int = Field(0, ge=0, description="iterations of the fake score alone")
    fake_score_learning_rate: float | None = Field(None, gt=0, le=1e6, description="default: the student's")
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

    @field_validator("discriminator_features")
    @classmethod
    def _heads_learn(cls, value: str, info: ValidationInfo) -> str:
        if value == "teacher" and info.data.get("discriminator") == "mean":
            raise ValueError(
                "discriminator mean has no weights of its own, and the teacher's stand still: nothing would learn to tell "
                "real from fake; set discriminator: heads"
            )
        return value

    @model_validator(mode="after")
    def _noisy_points(self) -> DistributionMatchingConfig:
        """What compares samples that keep noise can be had only in part."""
        if self.start_gap and self.policy != "trajectory":
            raise ValueError(
                f"start_gap {self.start_gap:g}: of policy trajectory; with {self.policy} every step count asks the first "
                "call for the same"
            )
        of_steps = {
            "step_conditioned": self.step_conditioned,
            "separate_levels": not self.separate_levels,
            "fake_score_target x0_hat": self.fake_score_target == "x0_hat",
        }
        for key, asked in of_steps.items():
            if asked and self.policy != "trajectory":
                raise ValueError(f"{key}: of policy trajectory, now {self.policy}")
        if not self.separate_levels and not self.step_conditioned:
            raise ValueError(
                "separate_levels false: the ends of several steps meet at one level, each with a law of its own; set "
                "step_conditioned: true"
            )
        if self.policy not in Noisy:
            return self
        if self.divergence not in ("reverse_kl", "huber_kl"):
            raise ValueError(
                f"policy {self.policy} compares samples that keep noise, divergence {self.divergence} clean ones; it takes "
                "reverse_kl or huber_kl"
            )
        if self.policy == "phases" and self.gan_weight > 0:
            raise ValueError("policy phases takes no GAN (gan_weight above 0): each phase has a fake score of its own")
        if self.policy == "phases" and len(self.steps) > 1:
            raise ValueError(
                f"policy phases trains one step count, got steps {self.steps}: the phases are those of its levels"
            )
        if self.policy == "phases" and self.parts > 1:
            raise ValueError(
                f"parts {self.parts}: several students of phases, a file for each of each, are not there; choose one"
            )
        for count in self.steps:
            self._levels_left(count)
        return self

    def below_top(self, count: int) -> float:
        """How far below the first level of all a step count starts."""
        return self.start_gap * sorted(set(self.steps)).index(count)

    def steps_before(self, count: int) -> int:
        """Steps of the counts below, in which this count's are numbered on."""
        return sum(k for k in set(self.steps) if k < count)

    def _levels_left(self, count: int) -> None:
        top = (self.init_level or 1.0) - self.below_top(count)
        for i in range(count):
            start, to = top * (1 - i / count), top * (1 - (i + 1) / count)
            above = start if self.separate_levels else top
            low, high = max(self.min_level, to + self.level_margin), min(self.max_level, above)
            if low >= high:
                raise ValueError(
                    f"no level is left to compare scores in step {i + 1} of {count}, from {start:.4g} to {to:.4g}: "
                    f"min_level {self.min_level:g}, max_level {self.max_level:g}, level_margin {self.level_margin:g}"
                )

    @model_validator(mode="after")
    def _pairs_of_steps(self) -> DistributionMatchingConfig:
        if not self.regression_weight:
            if self.regression_warmup_steps:
                raise ValueError(
                    f"regression_warmup_steps {self.regression_warmup_steps}: there are no pairs; set regression_weight"
                )
            return self
        if self.policy == "trajectory":
            if self.decodes:
                raise ValueError(
                    f"regression_metric {self.regression_metric}: policy trajectory holds steps that end in noisy latents to the teacher's; "
                    "choose squared or pseudo_huber"
                )
        elif self.policy == "phases" or 1 not in self.steps:
            raise ValueError(
                "regression_weight: compares what the student's one step makes of a noise; it takes 1 among steps, now "
                f"{self.steps}, and policy backward_simulation or noised_data, now {self.policy}; or policy trajectory"
            )
        return self

    @property
    def needs_ratio(self) -> bool:
        """Whether the divergence weighs samples by their density ratio; reverse KL weighs them alike, in either form."""
        return self.divergence in OfRatio and self.f != "rkl"

    @property
    def discriminates(self) -> bool:
        """Whether the fake score's role owns a discriminator, which needs images."""
        return self.gan_weight > 0 or self.needs_ratio

    @property
    def own_gan_levels(self) -> bool:
        """Whether it looks at noised samples of its own; a ratio is needed where the scores are compared."""
        return self.discriminator == "heads" and not self.needs_ratio

    @field_validator("max_level")
    @classmethod
    def _above(cls, value: float, info: ValidationInfo) -> float | None:
        return above(value, info, "min_level")

    @field_validator("guidance_scale_max")
    @classmethod
    def _wider(cls, value: float | None, info: ValidationInfo) -> float | None:
        return above(value, info, "guidance_scale")
