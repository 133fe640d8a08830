"""What every method's config takes. Imports no torch."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from fewstep.distill.data_config import DataConfig, Folder, Text
from fewstep.distill.eval_config import EvalConfig


class ConfigError(ValueError):
    """Every mistake of a config, one line each: file, key, what is wrong, what would be right."""


def above(value: float | None, info: ValidationInfo, key: str) -> float | None:
    """The value, which must exceed that of another key, checked before it; ValueError where it does not."""
    low = info.data.get(key)
    if value is not None and low is not None and value <= low:
        raise ValueError(f"must exceed {key} {low}")
    return value


def step_rules(rules: str) -> list[tuple[float, float]]:
    """`lr_step_rules` as (multiple, iteration that it ends before); the last's is infinity. ValueError where they are none."""
    *first, last = rules.split(",")
    try:
        pairs = [(float(multiple), float(int(end))) for multiple, end in (rule.split(":") for rule in first)]
        pairs.append((float(last), math.inf))
    except ValueError:
        pairs = []
    ends = [0.0, *(end for _, end in pairs)]
    if not pairs or not all(a < b for a, b in pairwise(ends)) or not all(0 < m < math.inf for m, _ in pairs):
        raise ValueError("must be multiples above 0 and growing iterations where they end, like 1:8000,0.5:9000,0.1")
    return pairs


class TrainConfig(DataConfig, EvalConfig, extra="forbid", frozen=True, allow_inf_nan=False):
    """What every method takes."""

    step_range: ClassVar[range] = range(1, 5)
    """Step counts that the method takes, of which a config declares some."""

    method: str
    name: Text = Field("run", description="run folder under output_dir")
    output_dir: Folder = "runs"
    seed: int = Field(0, ge=0, lt=2**32)

    teacher: str = Field(description="pipeline folder, embedded:NAME, hub id or FILE.safetensors@CONFIG")
    revision: str | None = None
    variant: str | None = None
    student: Literal["lora", "full"] = "lora"
    rank: int = Field(64, ge=1)
    lora_alpha: float | None = Field(None, gt=0, description="default: the rank")
    target_modules: list[str] | None = Field(None, min_length=1, description="default: the family's")
    student_config: dict[str, Any] | None = Field(
        None,
        min_length=1,
        description="of a full student: overrides of the config of the teacher's network, as diffusers spells it, such as "
        "{layers_per_block: 1}; weights of the same shape are the teacher's",
    )
    student_init: str | None = Field(
        None, description="of a full student: the run, student or pipeline that it starts as; default: the teacher"
    )

    max_train_steps: int = Field(1000, ge=1)
    train_batch_size: int = Field(16, ge=1, description="rows per process and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0, le=1e6)
    lr_scheduler: Literal["constant", "linear", "cosine", "piecewise_constant"] = "constant"
    lr_step_rules: str | None = Field(
        None,
        validate_default=True,
        description="of piecewise_constant, as diffusers spells it: 1:8000,0.5:9000,0.1 is learning_rate until iteration "
        "8000, half of it until 9000, then a tenth",
    )
    lr_warmup_steps: int = Field(0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(0.0, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the student that is exported")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    sharding_strategy: Literal["no_shard", "full_shard"] = Field(
        "no_shard", description="full_shard: weights of every role lie spread over the processes (torch's fully_shard)"
    )
    use_8bit_adam: bool = Field(False, description="moments of the optimiser in 8 bits (bitsandbytes)")

    attention: Literal["auto", "sdpa", "xformers", "flash"] = Field(
        "auto", description="kernel; auto: xformers on a GPU where it works, else torch's own"
    )
    gradient_checkpointing: bool = Field(False, description="compute blocks again in the backward instead of keeping")
    compile: bool = Field(False, description="networks by torch.compile")
    channels_last: bool = Field(False, description="memory format of UNets")
    base_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the teacher's weights but its autoencoder's; what is trained stays in float32"
    )
    quantization_config: Literal["nf4", "int8"] | None = Field(
        None, description="of the frozen base of a LoRA (bitsandbytes)"
    )
    offload_encoders: bool = Field(
        True, description="text encoder and autoencoder wait on the CPU while networks train"
    )

    logging_steps: int = Field(10, ge=1)
    checkpointing_steps: int = Field(500, ge=1)
    checkpoints_total_limit: int = Field(2, ge=1)
    validation_steps: int | None = Field(None, ge=1, description="previews; default: only at the end")
    validation_prompts: list[Text] | None = None
    validation_guidance_scale: float | None = Field(None, description="of the teacher in previews and report")
    report_to: str | None = Field(None, description="an accelerate tracker: tensorboard, wandb, ...")
    report_num: int | None = Field(None, ge=2, description="samples per row of the final report; none: no report")
    report_steps: list[PositiveInt] | None = Field(
        None, description="of the student in the report; default: all it has"
    )
    report_teacher_steps: list[PositiveInt] = Field(
        [50, 4, 1], min_length=1, description="of the teacher in the report"
    )
    report_scheduler: str | None = Field(
        None, description="of the teacher in the report: ddim, dpmsolver++, unipc, ..."
    )
    report_prompts: list[str] | None = Field(
        None, description="files or embedded names, a table each; default: validation_prompts, or those of the training"
    )
    preflight: bool = Field(True, description="first sample the teacher here and through its stock pipeline")
    collapse_alarm: bool = Field(
        True, description="look at a few of the student's samples, and stop when they collapse"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        kinds = get_args(kind := cls.model_fields[info.field_name or ""].annotation) or (kind,)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
            raise ValueError("must be a number; YAML reads yes, no, on and off as true and false")
        return value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML reads of it without quotes

    @field_validator("quantization_config")
    @classmethod
    def _of_a_base(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("student") == "full":
            raise ValueError("needs student: lora; full students are trained copies of the base, in float32")
        return value

    @field_validator("student_config", "student_init")
    @classmethod
    def _full(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("student") == "lora":
            raise ValueError("needs student: full; a LoRA is one of the teacher's own network")
        if value is not None and info.data.get("student_config") is not None:
            raise ValueError("has its own network; give student_config or student_init, not both")
        return value

    @field_validator("steps", "step_counts", check_fields=False)
    @classmethod
    def _taken(cls, counts: list[int], info: ValidationInfo) -> list[int]:
        if not all(count in cls.step_range for count in counts):
            first, last = cls.step_range[0], cls.step_range[-1]
            raise ValueError(f"method {info.data.get('method')} takes {first} to {last}")
        return counts

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError("must be one folder name")
        return name

    @field_validator("lr_step_rules")
    @classmethod
    def _rules(cls, rules: str | None, info: ValidationInfo) -> str | None:
        known = info.data.get("lr_scheduler")  # none where it is a mistake of its own
        if known is not None and (rules is not None) is not (known == "piecewise_constant"):
            raise ValueError("goes with lr_scheduler: piecewise_constant, and that with it")
        if rules is not None:
            step_rules(rules)
        return rules

    @property
    def teacher_guidance(self) -> float:
        """Of the teacher in previews and report."""
        own = self.validation_guidance_scale
        return getattr(self, "guidance_scale", 1.0) if own is None else own

    def warm(self, iteration: int) -> float:
        """The warm-up's share of the learning rates at an iteration, above 0 and at most 1."""
        return min(1.0, (iteration + 1) / self.lr_warmup_steps) if self.lr_warmup_steps else 1.0

    def rate(self, iteration: int) -> float:
        """The share of the learning rates at an iteration: a pure function, so that resume needs no scheduler state."""
        warm, done = self.warm(iteration), iteration / self.max_train_steps
        if self.lr_step_rules is not None:
            return warm * next(multiple for multiple, end in step_rules(self.lr_step_rules) if iteration < end)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return warm * shape[self.lr_scheduler]

    @property
    def run_dir(self) -> Path:
        """Where the run is written."""
        return Path(self.output_dir).expanduser() / self.name
