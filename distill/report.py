"""The report: teacher in many and few steps, student in few, real pictures; one N, the same prompts and noise.

`Comparison` collects rows, `write` leaves report.json, report.md, a labelled picture and, for each row, a sheet of all
its images, from which the figures can be computed again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fewstep.distill import checkpoint, data, picture
from fewstep.distill.config import ConfigError, TrainConfig, validate
from fewstep.distill.evaluation import (
    REAL_SEED,
    Drawn,
    Sampler,
    Teacher,
    bar,
    default_metrics,
    draw,
    figures,
    reference_pictures,
    reference_seeds,
    student_sampler,
)
from fewstep.distill.prompt_sets import EMBEDDED, PromptSet, prompt_set
from fewstep.distill.table import label, labels, markdown
from fewstep.samplers.baseline import refuse_steps, scheduler_of
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import dtypes, load_student, student_in
from fewstep.samplers.manifest import read_manifest

COLUMNS = 8
"""Images of a row in the picture."""

PICTURE, SHEETS = Path("samples/report.png"), Path("samples/report")
"""In a run's folder: the labelled picture, and the sheets."""


class Comparison:
    """Rows over one or more sets of prompts.

    Args:
        sets: the first is the report's own, the others stand behind it as blocks.
        say: told each row as it is done.
        sheets: folder that gets a sheet with all images of each row; of further sets in a folder of their number.
    """

    def __init__(
        self,
        sets: Sequence[PromptSet],
        say: Callable[[str], None] = lambda line: None,
        sheets: Path | None = None,
    ):
        self.sets, self.say, self.sheets = list(sets), say, sheets
        self.metrics = [list(default_metrics(s)) for s in self.sets]
        self.references = [reference_pictures(s, names) for s, names in zip(self.sets, self.metrics, strict=True)]
        self.rows: list[list[dict[str, Any]]] = [[] for _ in self.sets]
        self.shown: list[Tensor] = []
        self.many: list[Tensor | None] = [None] * len(self.sets)
        self._real()

    def _real(self) -> None:
        """Real pictures as a row: what a perfect model would get."""
        for i, prompts in enumerate(self.sets):
            if self.references[i] is None:
                continue
            from fewstep.metrics.emoji.metrics import renderings

            row = {"source": "real renderings", "role": "reference", "steps": 0, "nfe": 0, "guidance": None}
            images = renderings(prompts.prompts, REAL_SEED)
            self._keep(i, row | {"scheduler": None, "seconds_per_image": None}, images)

    def add(self, sampler: Sampler, many: bool = False, batch_size: int = 16) -> None:
        """Draw and measure a row; `many`: its images are the target of the rows that follow."""
        for i, prompts in enumerate(self.sets):
            with bar(len(prompts), f"{sampler.role}, steps {sampler.steps}, {prompts.name}") as progress:
                drawn = draw(sampler, prompts, batch_size, progress, self.references[i])
            self.keep(i, sampler, drawn, many)

    def keep(self, i: int, sampler: Sampler, drawn: Drawn, many: bool = False) -> None:
        """Measure a row of set `i` that is drawn already."""
        row = {
            "source": sampler.source,
            "role": sampler.role,
            "steps": sampler.steps,
            "nfe": drawn.nfe,
            "guidance": sampler.guidance,
            "scheduler": sampler.scheduler,
            "seconds_per_image": drawn.seconds_per_image,
        }
        self._keep(i, row, drawn.images)
        if many:
            self.many[i] = drawn.images

    def _keep(self, i: int, row: dict[str, Any], images: Tensor) -> None:
        began = time.monotonic()
        found = figures(images, self.sets[i], self.metrics[i], self.references[i], self.many[i])
        row["metrics"] = {k: {"value": finite(v), "stderr": finite(e)} for k, (v, e) in found.items()}
        self.rows[i].append(row)
        if i == 0:
            self.shown.append(images[:COLUMNS].clone())
        if self.sheets is not None:
            name = f"{len(self.rows[i]) - 1}-{label(row).replace(', ', '-').replace(' ', '-')}.png"
            picture.save(picture.sheet(images), self.sheets / (str(i) if i else "") / name)
        cost = "" if row["seconds_per_image"] is None else f", {row['seconds_per_image']:.3f} s an image"
        took = f", judged in {time.monotonic() - began:.0f} s"
        self.say(f"report: {label(row)}: {len(images)} images of {self.sets[i].name}{cost}{took}")

    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        blocks = []
        for prompts, rows in zip(self.sets, self.rows, strict=True):
            block = {"n": len(prompts), "seeds": prompts.seeds, "prompts": prompts.name, "rows": rows}
            if prompts.embedded:
                block["reference_seeds"] = reference_seeds()
            blocks.append(block)
        return {"schema": 1, **blocks[0], "blocks": blocks[1:]}

    def picture(self) -> Any:
        """The first images of every row of the first set, labelled."""
        heads = self.sets[0].prompts[:COLUMNS]
        rows = []
        for row, said, images in zip(self.rows[0], labels(self.rows[0]), self.shown, strict=True):
            if row["role"] == "reference":
                continue  # real pictures share no noise with the others
            guided = f"\nguidance {row['guidance']:g}" if row["role"] == "teacher" else ""
            rows.append((said, f"{row['scheduler']}{guided}", images))
        return picture.labelled(rows, heads)


def finite(value: float) -> float | None:
    """A number as JSON has them: None for what is not finite."""
    return value if math.isfinite(value) else None


def write_json(report: dict[str, Any], path: Path) -> None:
    """report.json, and the same as a table in a file of the same name that ends in .md."""
    with checkpoint.writing(path, "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path.with_suffix(".md"), markdown(report))
        checkpoint.write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write(comparison: Comparison, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """report.json, report.md and samples/report.png of a run."""
    report = comparison.report() | {"iteration": read_manifest(folder / "student").iteration, "asked": asked(config)}
    picture.save(comparison.picture(), folder / PICTURE)
    write_json(report, folder / "report.json")
    return report


def prompt_sources(config: TrainConfig, captions: Sequence[str] | None = None) -> list[str | Sequence[str]]:
    """Prompts of a run's report: `report_prompts`, or else those of the previews, or else those of the training.

    `captions` are the data set's, where it is in memory: else its files are looked through.
    """
    if config.report_prompts:
        return list(config.report_prompts)
    if config.validation_prompts:
        return [config.validation_prompts]
    source = config.prompts or config.train_data
    if source in EMBEDDED or config.prompts:
        assert source is not None
        return [source]
    return [data.captions(config) if captions is None else captions]


def prompt_sets(config: TrainConfig, captions: Sequence[str] | None = None) -> list[PromptSet]:
    """The sets of a run's report; UserError for what is wrong with them."""
    assert config.report_num is not None
    return [prompt_set(source, config.report_num, config.seed) for source in prompt_sources(config, captions)]


def check(
    config: TrainConfig, step_counts: Sequence[int], teacher: Denoiser, captions: Sequence[str] | None = None
) -> None:
    """Refuse, before training, a report that could not be made after it; `captions` as for `prompt_sources`."""
    if config.report_num is None:
        return
    size = teacher.pixels(config.height, config.width)
    clips = len(teacher.latent_shape(config.height, config.width, config.num_frames)) == 4
    for prompts in prompt_sets(config, captions):
        if prompts.embedded and (clips or size != (64, 64)):
            what = "clips" if clips else "images"
            raise ConfigError(
                f"config: report_prompts: {prompts.name} is judged by images of 64x64 pixels; this teacher makes {what} "
                f"of {size[0]}x{size[1]}"
            )
    wrong = [k for k in config.report_steps or [] if k not in step_counts]
    if wrong:
        allowed = ", ".join(map(str, step_counts))
        raise ConfigError(f"config: report_steps: {wrong[0]} is not a step count of this student; it has {allowed}")
    for k in config.report_teacher_steps:
        refuse_steps(scheduler_of(teacher.pipeline.scheduler, config.report_scheduler or "own"), k)


def current(config: TrainConfig) -> bool:
    """Whether a run's report is whole, of the student that is there now, and what the config asks for."""
    try:
        report = json.loads((config.run_dir / "report.json").read_text(encoding="utf-8"))
        made = (
            report["iteration"],
            report.get("asked", asked(config) | {"report_num": report["n"]}),
            bool(report["rows"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
        return False
    shown = (config.run_dir / "report.md").is_file() and (config.run_dir / PICTURE).is_file()
    return shown and made == (read_manifest(config.run_dir / "student").iteration, asked(config), True)


def asked(config: TrainConfig) -> dict[str, Any]:
    """What a config says of its report."""
    keys = ("num", "steps", "teacher_steps", "scheduler", "prompts")
    asked = {f"report_{key}" for key in keys} | {"validation_prompts", "validation_guidance_scale"}
    return config.model_dump(mode="json", include=asked)


def report_run(folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Make a run's report from what it left behind: its config, its teacher and its `student/`."""
    config = validate(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    if config.report_num is None:
        raise UserError(f"{folder}: its config has no report_num, so that it has no report")
    comparison = Comparison(prompt_sets(config), say=say, sheets=folder / SHEETS)
    size = {k: v for k in ("height", "width", "num_frames") if (v := getattr(config, k)) is not None}
    guidance = config.teacher_guidance
    loading = dtypes(config.base_dtype)
    teacher = Teacher(config.teacher, config.revision, config.variant, config.negative_prompt, loading, **size)
    for i, steps in enumerate(sorted(config.report_teacher_steps, reverse=True)):
        comparison.add(teacher.sampler(steps, guidance, config.report_scheduler), i == 0, config.train_batch_size)
    del teacher  # one pipeline in memory at a time
    # a full student is in float32 whatever its teacher was
    student, manifest = load_student(folder, **student_in(config.base_dtype if config.student == "lora" else "fp32"))
    for steps in sorted(config.report_steps or manifest.plans, reverse=True):
        comparison.add(student_sampler(student, manifest, str(folder), steps), batch_size=config.train_batch_size)
    return write(comparison, folder, config)
