"""What a run leaves behind: its folder, logs, previews, and the progress a person sees."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Distiller
from fewstep.distill.efficiency import autocast
from fewstep.distill.environment import FILE, KEPT, environment, note, noted
from fewstep.distill.objectives.levels import many_steps
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.manifest import check_weights, read_manifest, same_weights
from fewstep.samplers.plan import SamplingPlan, sample
from fewstep.samplers.router import ROUTER

MAY_CHANGE = {
    *("max_train_steps", "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
    *("validation_prompts", "validation_guidance_scale"),
    *("attention", "gradient_checkpointing", "compile", "channels_last", "offload_encoders"),
    *(
        "report_to",
        "report_num",
        "report_steps",
        "report_teacher_steps",
        "report_scheduler",
        "report_prompts",
        "output_dir",
        "cache_dir",
        "lpips_weights",
        "best_metric",
        "early_stopping_patience",
        "eval_steps",
        "eval_metrics",
        "eval_num",
        "eval_prompts",
        "eval_sampling_steps",
        "eval_reference",
        "eval_weights",
        "preflight",
        "collapse_alarm",
    ),
    *("sharding_strategy", "train_batch_size", "gradient_accumulation_steps"),  # as long as the rows are as many
}
"""Keys that a resumed run may set anew."""


def refuse_changes(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The config that a run's folder has; UserError where it differs from this one in what a run cannot change."""
    try:
        then = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        then = None
    if not isinstance(then, dict):
        raise UserError(
            f"{folder / 'config.yaml'}: no longer the config of a run, which is not resumed without; name=OTHER"
        )
    now = config.model_dump(mode="json")
    changed = [k for k in now if k not in MAY_CHANGE and then.get(k, now[k]) != now[k]]
    sequential = getattr(config, "policy", None) == "phases" and getattr(config, "phase_order", None) == "sequential"
    if sequential and then.get("max_train_steps") != now["max_train_steps"]:
        changed.append("max_train_steps")  # which says when a phase ends
    if changed:
        said = ", ".join(f"{k} (was {then.get(k)!r}, now {now[k]!r})" for k in changed)
        raise UserError(f"{folder}: cannot be resumed with other values of {said}")
    return then


def refuse_foreign(folder: Path) -> None:
    """UserError for a folder with files that a run would write over, where no run was begun."""
    for name in ("config.yaml", "student", "checkpoints", "metrics.jsonl", "report.json"):
        if (folder / name).exists():
            raise UserError(f"{folder}: has a {name} that is no run's; say name=OTHER, or another output_dir")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """UserError where another process trains in this folder, made if it is not there. The lock ends with the process."""
    with checkpoint.writing(folder, "set output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        try:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: a run is training there; wait for it, or say name=OTHER") from None
        except (ImportError, OSError):
            pass  # no such locks on this system
        yield
    finally:
        os.close(held)


def check_tracker(name: str | None) -> None:
    """UserError for a tracker that accelerate does not know, or whose package it would miss without a word."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    if name is not None and name not in known:
        raise UserError(f"report_to {name}: no tracker of accelerate; known: {', '.join(known)}")
    if name is not None and name not in {tracker.value for tracker in get_available_trackers()}:
        raise UserError(f"report_to {name}: its package is not installed; try: pip install {name}")


class Record:
    """The run's folder; only the main process writes.

    Args:
        config: the run's.
        accelerator: says who is the main process, and owns the trackers.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = config.run_dir
        self.checkpoints = self.folder / "checkpoints"
        self.preview_condition: Condition | None = None
        self._teacher: tuple[Denoiser, Tensor | None] | None = None
        self._bar: Any = None
        self._goes_on = False
        self._spoke = self._began = time.monotonic()

    def open(self, resume: bool) -> None:
        """Make the folder and write config and environment; UserError where a run is there already."""
        written, now = self.folder / "config.yaml", self.config.model_dump(mode="json")
        # a folder where nothing was trained yet (the teacher did not load, say) holds no run
        begun = (self.folder / "metrics.jsonl").is_file() or bool(checkpoint.iterations(self.checkpoints))
        if begun and not resume:
            raise UserError(f"{self.folder}: holds a run already; --resume continues it, name=OTHER starts another")
        if (self.folder / ROUTER).is_file():
            raise UserError(f"{self.folder}: holds a run of several students (parts); name=OTHER starts another")
        self._goes_on = begun
        if begun and noted(self.folder).get("moved"):
            raise UserError(f"{self.folder}: its teacher's weights changed while it trained; name=OTHER starts another")
        if begun:
            then = refuse_changes(self.folder, self.config)
            self._same_rows(then, now)
            ends = then.get("max_train_steps"), now["max_train_steps"]
            if ends[0] != ends[1] and self.config.lr_scheduler in ("linear", "cosine"):
                self.say(
                    f"lr_scheduler {self.config.lr_scheduler}: falls to iteration {ends[1]} now, and no more to {ends[0]}"
                )
        elif not (self.folder / FILE).is_file():
            refuse_foreign(self.folder)
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.accelerator.is_main_process:
            then = noted(self.folder) if begun else {}
            found = environment() | {"processes": self.accelerator.num_processes}
            # by which its config is known for a run's own, should the disk be full before that is written
            note(self.folder, found | {k: v for k, v in then.items() if k in KEPT})
            with checkpoint.writing(self.folder, "set output_dir"):
                checkpoint.write_text(written, yaml.safe_dump(now, sort_keys=False))
        self.accelerator.wait_for_everyone()
        if self.config.report_to:
            self.accelerator.init_trackers("fewstep")

    def same_data(self, captions: Sequence[str], samples: int) -> None:
        """Note what a run learns from; UserError where a resumed one would go on with other captions, or other many samples."""
        digest = sha256("\0".join(captions).encode("utf-8", "surrogatepass")).hexdigest()
        now = {"samples": samples, "captions": digest}
        self._same("data", now, self._before("data", now) == now, "other samples or captions")

    def same_teacher(self, mark: str) -> None:
        """Note the teacher's fingerprint; UserError where a resumed run would go on with another's weights."""
        self._same("teacher", mark, same_weights(self._before("teacher", mark), mark), "other weights of its teacher")

    def teacher_moved(self) -> None:
        """Note that the teacher's weights changed: no checkpoint of this run is worth going on with."""
        if self.accelerator.is_main_process:
            note(self.folder, noted(self.folder) | {"moved": True})

    def _before(self, key: str, now: Any) -> Any:
        """What a resumed run began with, as far as it is known."""
        return noted(self.folder).get(key, now) if self._goes_on else now

    def _same(self, key: str, now: Any, same: bool, what: str) -> None:
        if not same:
            raise UserError(f"{self.folder}: cannot be resumed with {what} than it began with")
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.accelerator.is_main_process:
            note(self.folder, noted(self.folder) | {key: now})

    def _same_rows(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        """UserError where iterations would have other rows than before: on another number of processes, say."""
        processes = self.accelerator.num_processes
        before = noted(self.folder).get("processes")
        before = before if isinstance(before, int) else processes
        keys = ("train_batch_size", "gradient_accumulation_steps")
        were, are = ([c.get(k, now[k]) for k in keys] + [n] for c, n in ((then, before), (now, processes)))
        if math.prod(were) != math.prod(are):
            counts = [" x ".join(map(str, factors)) for factors in (were, are)]
            raise UserError(
                f"{self.folder}: cannot be resumed with other rows an iteration: {keys[0]} x {keys[1]} x processes was "
                f"{counts[0]}, now {counts[1]}"
            )

    def finished(self) -> bool:
        """Whether the last iteration's checkpoint is whole and the student is written from it."""
        try:
            made = read_manifest(self.folder / "student").iteration
            check_weights(self.folder / "student")
        except UserError:
            return False
        # of another iteration where a run that went on longer was stopped before its student was written
        last = self.checkpoints / f"step-{self.config.max_train_steps:06d}"
        if checkpoint.fault(last) is None:
            return made == self.config.max_train_steps
        newest, _ = checkpoint.latest(self.checkpoints)
        if newest is None or not self.config.worn_out(meta := checkpoint.meta(newest)):
            return False
        return made == meta["iteration"]

    def say(self, line: str) -> None:
        """One line to the person at the terminal."""
        if self.accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)

    def progress(self, iterations: Iterable[int]) -> Generator[int]:
        """A bar with rate and time left on a terminal, plain lines elsewhere."""
        if not (self.accelerator.is_main_process and sys.stderr.isatty()):
            yield from iterations
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        iterations = list(iterations)
        first, last = (iterations[0], iterations[-1] + 1) if iterations else (0, 0)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(self.config.name, total=last, completed=first)
            self._bar = (bar, task)
            for i in iterations:
                yield i
                bar.update(task, completed=i + 1)
        self._bar = None

    def log(self, iteration: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, the trackers, and a line for people every few seconds."""
        if not self.accelerator.is_main_process:
            return
        elapsed = time.monotonic() - self._began
        path = self.folder / "metrics.jsonl"
        with checkpoint.writing(path, "checkpoints are whole"), path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values, "seconds": round(elapsed, 3)}) + "\n")
        if self.config.report_to:
            self.accelerator.log(values, step=iteration)
        short = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, description=short)
        elif time.monotonic() - self._spoke > 10 or iteration == self.config.max_train_steps:
            self._spoke = time.monotonic()
            self.say(f"{iteration}/{self.config.max_train_steps}  {elapsed:.0f} s  {short}")

    def rewind(self, iteration: int) -> None:
        """Drop the logged lines after an iteration: they will be written again, and the seconds go on."""
        path = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and path.is_file():
            kept, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines:
                try:
                    if json.loads(line)["iteration"] <= iteration:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a kill
            with checkpoint.writing(path, "checkpoints are whole"):
                if lines and not kept:  # no checkpoint is left of what it tells
                    path.replace(path.with_suffix(".lost.jsonl"))
                checkpoint.write_text(path, "".join(line + "\n" for line in kept))
            if kept:  # seconds go on from there
                self._began -= json.loads(kept[-1]).get("seconds") or 0.0

    def previews(self, teacher: Denoiser, condition: Condition) -> None:
        """Fix what the previews show: these conditions, one seed each."""
        self.preview_condition, self._teacher = condition, (teacher, None)

    def forget(self) -> None:
        """Let the previews' teacher go, once the last is drawn."""
        self.preview_condition = self._teacher = None

    def preview(self, method: Distiller, student: Denoiser, iteration: int) -> None:
        """A picture: the teacher's row, and one row for each step count of the student, same noise."""
        # of sharded networks every process samples the same, since each call needs the parts of all
        alone = self.config.sharding_strategy == "no_shard"
        if self.preview_condition is None or self._teacher is None or (alone and not self.accelerator.is_main_process):
            return
        from torchvision.utils import save_image  # type: ignore[import-untyped]

        condition = self.preview_condition
        at_once = self.config.train_batch_size  # no more rows than training has: memory
        seeds = [self.config.seed + i for i in range(condition.size)]
        teacher, picture = self._teacher
        shape = pixels_shape(self.config, student)

        def drawn(denoiser: Denoiser, plan: SamplingPlan) -> Tensor:
            rows = [range(len(seeds))[i : i + at_once] for i in range(0, len(seeds), at_once)]
            with autocast(self.accelerator.mixed_precision, self.accelerator.device):
                parts = [sample(denoiser, condition[r], plan, [seeds[i] for i in r], shape) for r in rows]
            return pictures(student, torch.cat(parts))

        if picture is None:
            picture = drawn(teacher, many_steps(teacher, 20, self.config.teacher_guidance))
            self._teacher = teacher, picture
        rows = [picture]
        for steps in sorted(method.step_counts, reverse=True):
            rows.append(drawn(student, method.plan(steps)))
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "samples" / f"step-{iteration:06d}.png"
        with checkpoint.writing(path, "checkpoints are whole"):
            path.parent.mkdir(exist_ok=True)
            save_image(torch.cat(rows), path, nrow=condition.size, padding=2)


def pixels_shape(config: TrainConfig, denoiser: Denoiser) -> tuple[int, ...]:
    """Latent shape of a run's samples."""
    return denoiser.latent_shape(config.height, config.width, config.num_frames)


def pictures(denoiser: Denoiser, latents: Tensor) -> Tensor:
    """Decoded images (B, 3, H, W); of clips the middle frame. The decoder visits the device for the call."""
    images = denoiser.decode(latents)
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images
