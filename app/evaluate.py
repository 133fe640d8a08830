"""`fewstep evaluate`: figures of students and teachers on the same prompts and noise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.distill import picture
from fewstep.distill.evaluation import Teacher, student_folder, student_sampler, teacher_of
from fewstep.distill.prompt_sets import prompt_set
from fewstep.distill.report import Comparison, write_json
from fewstep.samplers.load import load_student
from fewstep.samplers.manifest import Manifest, read_manifest


def evaluate(
    sources: Sequence[str],
    steps: Sequence[int],
    metrics: Sequence[str] | None,
    num: int,
    prompts: str,
    out: Path,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    many_steps: int = 50,
    batch_size: int = 16,
) -> dict[str, Any]:
    """A row for each source and step count; report.json, its table and a picture are written beside each other.

    The target of `psnr_to_teacher` is the first source that is a pipeline, or else the teacher of the first student,
    in `many_steps` steps, itself a row.
    """
    students = {s: read_manifest(folder) for s in sources if (folder := student_folder(s)) is not None}
    for manifest in students.values():
        for k in steps:
            manifest.plan(k)  # refuses a count before anything is sampled
    comparison = Comparison([prompt_set(prompts, num, seed)], metrics, lambda line: print(line, file=sys.stderr))
    if "psnr_to_teacher" in comparison.metrics[0]:
        comparison.add(_target(sources, students).sampler(many_steps, guidance, scheduler), True, batch_size)
    counts = sorted(set(steps), reverse=True)
    for source in sources:
        if source in students:
            student, manifest = load_student(source, fuse=True)
            samplers = [student_sampler(student, manifest, source, k) for k in counts]
        else:
            teacher = Teacher(source)
            samplers = [teacher.sampler(k, guidance, scheduler) for k in counts]
        for sampler in samplers:
            comparison.add(sampler, batch_size=batch_size)
    report = comparison.report()
    write_json(report, out)
    picture.save(comparison.picture(), out.with_suffix(".png"))
    return report


def _target(sources: Sequence[str], students: dict[str, Manifest]) -> Teacher:
    """The teacher that others are compared with: the first pipeline, or else the base of the first student."""
    for source in sources:
        if source not in students:
            return Teacher(source)
    return teacher_of(students[sources[0]])
