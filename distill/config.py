"""Configs: one flat YAML per run, keys spelt as in diffusers' training scripts. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from fewstep.distill.presets import PRESETS
from fewstep.distill.procedures import DisBackConfig
from fewstep.distill.train_config import ConfigError, TrainConfig, above

CONFIGS = Path(__file__).parent.parent / "configs"


class DenoisingConfig(TrainConfig, frozen=True):
    """Training of a network on noised images, with text dropout for guidance."""

    step_range = range(1, 1001)  # any: what comes out samples as its teacher, whose tables have at most 1000 levels
    student: Literal["lora", "full"] = "full"
    prompt_dropout: float = Field(0.1, ge=0, lt=1)
    weighting_scheme: Literal["none", "logit_normal"] = Field("none", description="of the levels; none: uniform")
    logit_mean: float = Field(0.0, description="of the logit of the level (arXiv:2403.03206, eq. 19)")
    logit_std: float = Field(1.0, gt=0)
    step_counts: list[PositiveInt] = Field([50], min_length=1)


class PretrainConfig(DenoisingConfig, frozen=True):
    """Ordinary denoising or flow matching training of a pipeline's network."""

    method: Literal["pretrain"]
    preflight: bool = Field(False, description="its teacher is only where training starts, and may be untrained")
    train_text_encoder: bool = False
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting (arXiv:2303.09556); none: weight 1")


class TSMConfig(DenoisingConfig, frozen=True):
    """Teacher score matching: a network of another size learns what the teacher says (arXiv:2410.23274)."""

    method: Literal["tsm"]
    weight_limit: float | None = Field(
        5.0, gt=0, description="of the weight of the error of x0; none: plain error of the network's output"
    )


class LCMConfig(TrainConfig, frozen=True):
    """Consistency distillation in latents (arXiv:2303.01469, 2310.04378)."""

    step_range = range(1, 9)  # the papers'; training is the same for all
    method: Literal["lcm"]
    guidance_scale: float = Field(7.5, description="of the teacher, folded into the student; 1 = none")
    guidance_scale_max: float | None = Field(
        None, description="with it the scale is drawn from guidance_scale..this and is an input of the student"
    )
    num_ode_steps: int = Field(50, ge=2, le=1000, description="levels of the teacher's grid")
    huber_c: float = Field(1e-3, gt=0)
    target_ema_decay: float = Field(0.95, ge=0, lt=1, description="of the target network, full students only")
    steps: list[PositiveInt] = Field(
        [1, 2, 4, 8], min_length=1, validate_default=True, description="step counts that the student declares"
    )

    @field_validator("guidance_scale_max")
    @classmethod
    def _above(cls, value: float | None, info: ValidationInfo) -> float | None:
        return above(value, info, "guidance_scale")

    @field_validator("steps")
    @classmethod
    def _on_the_grid(cls, steps: list[int], info: ValidationInfo) -> list[int]:
        n = info.data.get("num_ode_steps")
        if n is not None and max(steps) > n:
            raise ValueError(f"must be at most num_ode_steps {n}")
        return steps


METHODS: dict[str, type[TrainConfig]] = {
    **PRESETS,
    "disback": DisBackConfig,
    "lcm": LCMConfig,
    "pretrain": PretrainConfig,
    "tsm": TSMConfig,
}
"""Config of each method; its Distiller is named in `methods`."""


def find(config: str | Path) -> Path:
    """A config file by path, or a shipped one by name (`quickstart`, `lcm/sdxl`)."""
    path = Path(config)
    if path.is_file():
        return path
    shipped = CONFIGS / f"{str(config).removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{config}: a folder; did you mean {path / 'config.yaml'}?")
    names = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml"))
    near = difflib.get_close_matches(str(config), names, 1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(names)}"
    raise ConfigError(f"{config}: no such config file, and no shipped config of that name; {hint}")


class _Once(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is there twice")
        return super().construct_mapping(node, deep)


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check a config.

    Args:
        config: a path, a shipped name or a mapping.
        overrides: `key=value`, the value as YAML.

    Raises:
        ConfigError: all mistakes at once.
    """
    if isinstance(config, Mapping):
        where, values = "config", {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    else:
        path = find(config)
        where = str(config)
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Once)
        except (
            yaml.YAMLError,
            ValueError,
            RecursionError,
        ) as error:  # a date that there is not, text that is not UTF-8
            raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: must be a mapping of keys to values")
        values.setdefault("name", _run_name(path))
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item}: an override is key=value")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{item}: the value is not YAML; quote a text, as in {key}='\"2024\"'") from error
    return validate(values, where)


def _run_name(path: Path) -> str:
    """The file's name; of a recipe in a folder of `configs` both, so that lcm/sd15 and dmd2/sd15 do not meet."""
    inside = path.resolve().is_relative_to(CONFIGS.resolve())
    return "-".join(path.resolve().relative_to(CONFIGS.resolve()).with_suffix("").parts) if inside else path.stem


def validate(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A checked config of the method that `values` name; ConfigError lists every mistake."""
    method = values.get("method")
    if not isinstance(method, str) or method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        said = "missing" if method is None else f"{method!r} is unknown"
        raise ConfigError(f"{where}: method: {said}; {hint}known: {', '.join(sorted(METHODS))}")
    model = METHODS[method]
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_line(where, model, e) for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _line(where: str, model: type[TrainConfig], error: Mapping[str, Any]) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, 1)
        return f"{where}: {key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        field = model.model_fields.get(key)  # none of a part of a value
        return f"{where}: {key}: missing; {(field and field.description) or 'it is required'}"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if isinstance(error.get("input"), dict) else f"; got {error.get('input')!r}"
    return f"{where}: {key + ': ' if key else ''}{message}{got}"
