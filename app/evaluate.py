"""`fewstep evaluate`: figures of students, teachers and folders of images on the same prompts and noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.app import page
from fewstep.app.drawing import draw
from fewstep.app.processes import Processes
from fewstep.app.rows import Row, folder_row, grid, is_images, real_row
from fewstep.app.sources import negative_prompt, run_guidance
from fewstep.app.store import check_out, read_batches
from fewstep.distill import picture
from fewstep.distill.evaluation import (
    REAL_SEED,
    Sampler,
    Teacher,
    default_metrics,
    device,
    reference_pictures,
    reference_seeds,
    revisions,
    same_size,
    student_folder,
    student_sampler,
    teacher_of,
)
from fewstep.distill.evaluation import figures as of_pictures
from fewstep.distill.judges import Judges, refusals
from fewstep.distill.metric_names import DRAWINGS, METRICS, Weights, check, fewest, usable
from fewstep.distill.prompt_sets import prompt_set
from fewstep.distill.references import CACHE, read_reference
from fewstep.distill.report import finite, write_json
from fewstep.distill.seen import VARIETY, Seen, figures, see, see_prompt
from fewstep.distill.table import label, short, show
from fewstep.samplers.baseline import check_scheduler
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, dtypes, family, load_student, parts, student_in
from fewstep.samplers.manifest import read_manifest


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    sources: Sequence[str]
    steps: Sequence[int]
    metrics: Sequence[str] | None
    num: int
    prompts: str
    out: Path
    per_prompt: int | None = None
    reference: str | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int = 0
    teacher_steps: int = 50
    batch_size: int = 16
    judge_batch: int = 32
    cost_batches: Sequence[int] = ()
    weights: Weights = field(default_factory=Weights)
    timesteps: Sequence[int] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "fp32"
    eta: float | None = None


def evaluate(request: Request) -> None:
    """A row for each source and step count, on the terminal and as report.json, .md, .html and .png.

    Images are kept beside them in a folder that ends in .images; of a run that was interrupted only the missing ones
    are drawn. With several processes each draws and judges its share of the batches, and the first writes.
    """
    evaluation = Evaluation(request)
    evaluation.run()
    if not evaluation.processes.first:
        return
    report, out = evaluation.report(), request.out
    write_json(report, out)
    page.write(out.with_suffix(".html"), report, evaluation.rows)
    show(report)
    print(f"report   {out}\npage     {out.with_suffix('.html')}")
    if shown := [row for row in evaluation.rows if row.same_noise]:
        picture.save(picture.labelled(*grid(shown)), out.with_suffix(".png"))
        print(f"picture  {out.with_suffix('.png')}\nimages   {evaluation.root}")


class Evaluation:
    """One evaluation: what its rows share."""

    def __init__(self, request: Request):
        self.request, self.processes, self.loading = request, Processes(), dtypes(request.dtype)
        check_out(request.out)
        self.students = {s: read_manifest(f) for s in request.sources if (f := student_folder(s)) is not None}
        self.folders = [s for s in request.sources if s not in self.students and is_images(s)]
        for manifest in self.students.values():
            for k in request.steps:
                manifest.plan(k)  # refuses a count before anything is sampled
        self.prompts = prompt_set(request.prompts, request.num, request.seed, request.per_prompt)
        self.names = list(request.metrics or default_metrics(self.prompts))
        self.sampled = [s for s in request.sources if s not in self.folders]
        self.revisions = revisions(request.sources, request.revision)
        for source in self.sampled:
            if source not in self.students:
                family(class_of(source, self.revisions[source]))  # refuses what is no pipeline before anything is drawn
        own, counts = request.timesteps, request.steps
        if own is not None and any(k != len(own) for k in counts):
            raise UserError(f"--timesteps: {len(own)} of them for --steps {','.join(map(str, counts))}")
        self.size = self._size()
        self._check()
        self.judges = Judges(request.weights, device())
        if not self.processes.first:
            self.processes.wait()
        self.judges.load(self.names)  # and one process at most downloads
        if self.processes.first:
            self.processes.wait()
        self.real = reference_pictures(self.prompts, self.names)
        self.rows: list[Row] = []
        self.target: tuple[Row, Seen] | None = None
        self.notes: list[str] = []

    def _size(self) -> dict[str, Any]:
        """Of the pipelines' images: as asked, else that of the first student, else their own."""
        names, manifests = ("height", "width", "num_frames"), list(self.students.values())
        asked = {k: getattr(self.request, k) for k in names}
        for manifest in manifests:
            for k in (k for k in names if asked[k] not in (None, getattr(manifest, k))):
                raise UserError(f"--{k.replace('_', '-')} {asked[k]}: a student has the size it was trained at")
        return {k: getattr(manifests[0], k) for k in names} if manifests else asked

    def _check(self) -> None:
        """Refuse figures that no row could have, and a scheduler that there is not."""
        check_scheduler(self.request.scheduler or "own")
        given = {"images", "clips"} | ({"reference"} if self.request.reference else set())
        if self.sampled:
            given |= {"teacher", "prompts"} | ({"embedded"} if self.prompts.embedded else set())
            given |= {"variants"} if len(self.prompts) > len(set(self.prompts.groups)) else set()
        elif self.request.metrics is None:
            self.names = usable(self.names, given | {"variants"})
        else:  # whether a folder has prompts is seen when it is read
            given |= {"prompts", "variants"}
        check(self.names, given, self.prompts.name)
        if (path := self.request.reference) not in (None, "teacher") and not Path(path).exists():
            raise UserError(f"--reference {path}: neither a folder of images, nor a .npz of mu and sigma, nor teacher")
        if self.request.reference == "teacher" and not self.sampled:
            raise UserError("--reference teacher: folders of images have no teacher; name a pipeline or a student too")
        for name in self.names if self.sampled else []:
            if len(self.prompts) < (least := fewest(name)):
                raise UserError(f"metric {name}: needs {least} images or more; say --num {least} or more")
        if self.sampled and all(source in self.students for source in self.sampled):
            drawn = self._needs_teacher()  # by a scheduler and with guidance, but in steps of its own
            told = {
                "guidance-scale": self.request.guidance_scale,
                "scheduler": self.request.scheduler,
                "eta": self.request.eta,
            }
            for option, value in {"timesteps": self.request.timesteps, **({} if drawn else told)}.items():
                if value is not None:
                    raise UserError(
                        f"--{option}: students sample by their own plans, and no pipeline is drawn; leave it out"
                    )
        if not self.names:
            raise UserError("--metrics: none suits folders of images alone; say e.g. --metrics fid --reference FOLDER")

    def run(self) -> None:
        """All rows, in the order of the table."""
        request = self.request
        reference = None
        if request.reference not in (None, "teacher") and self.processes.first:
            reference = read_reference(
                request.reference, self.names, self.judges, CACHE.expanduser(), request.judge_batch
            )
        if self.real is not None and self.sampled:
            self.judge(real_row(self.root, self.prompts, REAL_SEED, self.processes), None)
        if self._needs_teacher():
            target = self._target()
            row = self._draw(target.sampler(request.teacher_steps, **self._how(None)), target.negative_prompt)
            seen = self.judge(row, reference)
            self.target = (row, seen)
            if request.reference == "teacher":
                reference = seen
        for source in request.sources:
            for row in self._rows(source):
                self.judge(row, reference)

    def _needs_teacher(self) -> bool:
        asks = self.request.reference == "teacher" or any("teacher" in METRICS[n].needs for n in self.names)
        return asks and bool(self.sampled)

    def _rows(self, source: str) -> Iterator[Row]:
        if source in self.folders:
            with refusals():
                row = folder_row(source, self.names)
            self._kind(row.clips)
            self._note(row, row.lacks)
            yield row
            return
        counts = sorted(set(self.request.steps), reverse=True)
        if source in self.students:
            variant, revision = self.request.variant, self.revisions[source]
            loading = student_in(self.request.dtype)
            student, manifest = load_student(source, variant=variant, revision=revision, **loading)
            for k in counts:
                yield self._draw(student_sampler(student, manifest, source, k), manifest.plan(k).model_dump_json())
        else:
            teacher = self._teacher(source, source)
            for k in counts:
                yield self._draw(teacher.sampler(k, **self._how(source)))

    def _teacher(self, source: str, pipeline: str) -> Teacher:
        return Teacher(pipeline, self.revisions[source], self.request.variant, loading=self.loading, **self.size)

    def _how(self, source: str | None) -> dict[str, Any]:
        """Of a pipeline, None: of the teacher to compare with. As asked, but where some have a LoRA, of those alone."""
        request = self.request
        distilled = any(parts(s)[1] for s in self.sampled)
        if distilled and (source is None or not parts(source)[1]):
            return {}
        own = {} if source is None else {"timesteps": request.timesteps}
        guidance = request.guidance_scale
        if guidance is None and (source is None or not parts(source)[1]):
            guidance = self._guidance(source)
        return {"guidance": guidance, "scheduler": request.scheduler, "eta": request.eta, **own}

    def _guidance(self, source: str | None) -> float | None:
        """That of the run of the first student that a pipeline, None: any, is the teacher of; else the pipeline's own."""
        of = (s for s, manifest in self.students.items() if source in (None, manifest.base))
        found = (run_guidance(folder) for s in of if (folder := student_folder(s)) is not None)
        return next((scale for scale in found if scale is not None), None)

    def _target(self) -> Teacher:
        """The teacher that others are compared with: the first pipeline without its LoRA, or the first student's base."""
        first = next((s for s in self.sampled if s not in self.students), self.sampled[0])
        if first not in self.students:
            return self._teacher(first, parts(first)[0])
        negative, variant = negative_prompt(student_folder(first) or Path()), self.request.variant
        return teacher_of(self.students[first], negative, self.revisions[first], variant, self.loading)

    @property
    def root(self) -> Path:
        """Folder of the images."""
        return self.request.out.with_suffix(".images")

    def _draw(self, sampler: Sampler, plan: str = "") -> Row:
        r = self.request
        plan += "".join(f" {v}" for v in (r.revision, r.variant) if v)
        return draw(sampler, plan, self.prompts, self.root, r.batch_size, r.cost_batches, self.processes, self._accept)

    def _accept(self, image: Tensor) -> None:
        """Refuse after one image what no figure could judge."""
        if self.real is not None:
            same_size(image, self.prompts, self.real)
        self._kind(image.ndim == 5)
        names, target = [n for n in self.names if n not in DRAWINGS], self.target and self.target[0].images([0])
        see(Seen(), image, [0], names, self.judges, self.prompts.prompts[:1], target)

    def _kind(self, clips: bool) -> None:
        given = set().union(*(METRICS[n].needs for n in self.names)) - {"images", "clips"}
        check(self.names, given | {"clips" if clips else "images"}, self.prompts.name)

    def judge(self, row: Row, reference: Seen | None) -> Seen:
        """Measure a row; each process sees its share of the images, and the first reads the figures."""
        began = time.monotonic()
        names = usable(self.names, row.given() | {"reference", "teacher", "images", "clips", "embedded"})
        if row.row["role"] == "reference":
            names = [n for n in names if n in DRAWINGS]
        seen = Seen()
        targets = self.target[0] if self.target and row.same_noise else None
        size, n = self.request.judge_batch, len(row.files)
        chunks = [range(i, min(i + size, n)) for i in range(0, n, size)]
        numbers = [i for chunk in self.processes.share(chunks) for i in chunk]
        network = [n for n in names if n not in DRAWINGS]
        with self.processes.bar(len(numbers), f"judging {self._label(row)}") as progress, refusals():
            for keys, images in read_batches(row.files, numbers, size, row.clips):
                prompts = [row.prompts[i] for i in keys] if row.prompts else None
                target = targets.images(keys) if targets else None
                see(seen, images, keys, network, self.judges, prompts, target)
                if progress is not None:
                    progress(len(keys))
            if row.groups and VARIETY & set(network):
                for group, members in self.processes.share(list(row.members().items())):
                    see_prompt(seen, row.images(members), group, network, self.judges)
        seen = self.processes.together(seen)
        if self.processes.first:
            teacher = self.target[1] if self.target and row.same_noise else None
            found, notes = figures(network, seen, self.judges, row.groups, reference, teacher)
            drawings = [n for n in names if n in DRAWINGS]
            if drawings and row.row["role"] != "folder":
                found |= of_pictures(pictures := row.images(range(n)), self.prompts, drawings, self.real)
                if row.same_noise and "clip_emoji" in drawings:
                    from fewstep.metrics.emoji.metrics import followed

                    seen.scores.update(range(n), clip_emoji=followed(pictures, self.prompts.prompts))
            found = {n: found[n] for n in self.names if n in found}
            row.row["metrics"] = {k: {"value": finite(v), "stderr": finite(e)} for k, (v, e) in found.items()}
            row.scores = seen.scores
            if not found:
                wanted = "those of the embedded drawings need their prompts" if set(self.names) & set(DRAWINGS) else ""
                notes = [*notes, f"none of the figures suits it{wanted and '; ' + wanted}; --metrics names others"]
            self._note(row, notes)
            cost = row.row["seconds_per_image"]
            said = "" if cost is None else f", {cost:.3f} s an image"
            took = time.monotonic() - began
            self.processes.say(f"report: {self._label(row)}: {len(row.files)} images{said}, judged in {took:.0f} s")
        self.rows.append(row)
        return seen

    def _note(self, row: Row, lines: Sequence[str]) -> None:
        self.notes += [f"{self._label(row)}: {line}" for line in lines]
        for line in lines:
            self.processes.say(f"note: {self._label(row)}: {line}")

    def _label(self, row: Row) -> str:
        """With its source where there are several."""
        names = short({*self.request.sources, row.row["source"]})
        return label(row.row, names[row.row["source"]] if len(self.request.sources) > 1 else None)

    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        prompts = self.prompts
        report: dict[str, Any] = {"schema": 1}
        if any(row.same_noise for row in self.rows):  # else nobody was told them
            report |= {"n": len(prompts), "seeds": prompts.seeds, "prompts": prompts.name}
        if self.real is not None:
            report["reference_seeds"] = reference_seeds()
        report |= {k: v for k in ("reference", "revision", "variant") if (v := getattr(self.request, k))}
        report |= {"dtype": self.request.dtype} if self.request.dtype != "fp32" else {}
        report["networks"] = self.judges.names()
        report["notes"] = list(dict.fromkeys(self.notes))
        return report | {"rows": [row.row for row in self.rows], "blocks": []}
