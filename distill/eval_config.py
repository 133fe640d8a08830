"""Keys of a config for figures of the student while it trains. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, PositiveInt, ValidationInfo, field_validator

from fewstep.distill.metric_names import METRICS, Weights, unknown

PREFIX = "eval/"
"""Before the names of figures among the logged scalars."""


class EvalConfig(BaseModel, frozen=True):
    """Figures every N iterations, on fixed prompts and noise."""

    eval_steps: int | None = Field(
        None, ge=1, description="figures of the student every so many iterations; none: never"
    )
    eval_metrics: list[str] = Field([], validate_default=True, description="of `fewstep metrics`, logged as eval/NAME")
    eval_num: int = Field(256, ge=4, description="images that they are taken from")
    eval_prompts: str | None = Field(None, description="a file or embedded name; default: those of the report")
    eval_sampling_steps: PositiveInt | None = Field(None, description="of the student; default: its fewest")
    eval_reference: str | None = Field(
        None, validate_default=True, description="a folder of images, or a .npz of mu and sigma"
    )
    eval_weights: Weights = Field(Weights(), description="where the networks that judge come from")
    best_metric: str | None = Field(
        None, description="keep the checkpoint with the best of this logged scalar, e.g. student/loss or eval/fid"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="end after so many evaluations in a row that do not better best_metric; none: never"
    )

    @field_validator("eval_metrics")
    @classmethod
    def _usable(cls, names: list[str], info: ValidationInfo) -> list[str]:
        for name in names:
            if name not in METRICS:
                raise ValueError(unknown(name))
            if "teacher" in METRICS[name].needs:
                raise ValueError(f"metric {name}: compares with the teacher's images, which only the report draws")
        if info.data.get("eval_steps") and not names:
            raise ValueError("name the figures that eval_steps asks for, e.g. [clip]")
        return names

    @field_validator("eval_reference")
    @classmethod
    def _given(cls, source: str | None, info: ValidationInfo) -> str | None:
        needy = [n for n in info.data.get("eval_metrics", []) if "reference" in METRICS[n].needs]
        if needy and source is None:
            raise ValueError(f"metric {needy[0]} needs a folder of images or a .npz of mu and sigma")
        return source

    @field_validator("best_metric")
    @classmethod
    def _evaluated(cls, scalar: str | None, info: ValidationInfo) -> str | None:
        if scalar is not None and scalar.startswith(PREFIX):
            names = info.data.get("eval_metrics", [])
            if info.data.get("eval_steps") is None or scalar.removeprefix(PREFIX) not in names:
                raise ValueError("needs eval_steps, and its figure among eval_metrics")
        return scalar

    @field_validator("early_stopping_patience")
    @classmethod
    def _of_a_figure(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and not (info.data.get("best_metric") or "").startswith(PREFIX):
            raise ValueError(f"needs best_metric, one of the figures: {PREFIX}fid or the like")
        return patience

    @property
    def figure_is_best(self) -> bool:
        """Whether `best_metric` is one of the figures, and no loss."""
        return (self.best_metric or "").startswith(PREFIX)

    @property
    def best_loss(self) -> str | None:
        """`best_metric` where it is none of the figures, so that every iteration logs it."""
        return None if self.figure_is_best else self.best_metric

    def evaluates(self, iteration: int) -> bool:
        """Whether figures are taken after so many iterations: at every `eval_steps`, and after the last."""
        last = getattr(self, "max_train_steps", None)
        return self.eval_steps is not None and (iteration % self.eval_steps == 0 or iteration == last)

    def new_best(self, scalars: Mapping[str, float], best: float | None, judged: bool) -> float | None:
        """The value of `best_metric` where it is better than the best: losses and distances fall, scores rise.

        Figures count only where they were taken (`judged`), and not for the weights of a later iteration.
        """
        name = self.best_metric or ""
        value = scalars.get(name)
        if value is None or (self.figure_is_best and not judged):
            return None
        rises = self.figure_is_best and METRICS[name.removeprefix(PREFIX)].better == "higher"
        return value if best is None or (value > best if rises else value < best) else None

    def worn_out(self, meta: Mapping[str, Any]) -> bool:
        """Whether a run whose checkpoint says this ended early, and would still."""
        return bool(meta.get("worn_out")) and self.wears_out(meta["iteration"], meta["best"], None)

    def wears_out(self, iteration: int, best: tuple[float, int] | None, new: float | None) -> bool:
        """Whether `early_stopping_patience` evaluations in a row were no better than `best`, a value and its iteration."""
        patience = self.early_stopping_patience
        if patience is None or self.eval_steps is None or best is None or new is not None:
            return False
        return self.evaluates(iteration) and iteration - best[1] >= patience * self.eval_steps
