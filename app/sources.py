"""What the playground shows: teachers, and beside them the students that were made from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.distill.captions import read_prompts
from fewstep.distill.evaluation import Sampler, Teacher, student_folder, student_sampler, teacher_of
from fewstep.distill.prompt_sets import EXAMPLES
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, denoiser_of, dtypes, family, load_student, resolve, student_in
from fewstep.samplers.manifest import MANIFEST, Manifest, read_manifest

EMBEDDED_TEACHER = "embedded:emoji"
NO_STUDENT = "no student under runs/ yet; make one: fewstep train quickstart"

TEACHER_STEPS = (1, 2, 4, 8)
"""Step counts offered of a pipeline without a student: it takes any."""

MANY, FEW, STUDENT = "Teacher, many steps", "Teacher, few steps", "Student"

PROMPTS = (
    "a red apple on a wooden table",
    "an old fisherman with a white beard, portrait photograph",
    "a lighthouse on a cliff at sunset, oil painting",
    "a cat walking through tall grass",
)
"""Examples for models that draw anything."""


@dataclass(frozen=True)
class Source:
    """A teacher in memory, and beside it, if that is what was named, a student of its.

    Attributes:
        name: as the user said it.
        teacher: for samples of the student's size.
        student: its denoiser and manifest; None: a pipeline alone.
        step_counts: that the student declares; of a pipeline alone some usual ones.
        many_steps: of the teacher, unless the user changes it.
        guidance_scale: of the teacher likewise; None: it takes none.
        prompts: examples; none where the model takes no prompt.
        clips: whether it makes clips.
        size: height, width and num_frames, unless the user changes them; of those that its pipeline's call takes.
    """

    name: str
    teacher: Teacher
    student: tuple[Denoiser, Manifest] | None
    step_counts: Sequence[int]
    many_steps: int
    guidance_scale: float | None
    prompts: list[str]
    clips: bool
    size: dict[str, int]

    @property
    def labels(self) -> list[str]:
        """Of the pictures, from left to right."""
        return [MANY, FEW] if self.student is None else [MANY, FEW, STUDENT]

    def sampler(self, label: str, steps: int, many_steps: int, guidance_scale: float | None, **size: Any) -> Sampler:
        """Who draws the picture of a label; `guidance_scale` is the teacher's, `size` what differs from the usual one."""
        if label == STUDENT:
            assert self.student is not None
            return student_sampler(*self.student, self.name, steps, **size)
        return self.teacher.sampler(many_steps if label == MANY else steps, guidance_scale, **size)


def newest_student(folder: Path = Path("runs")) -> str | None:
    """The run with the newest student."""
    found = [(m.stat().st_mtime, str(m.parent.parent)) for m in folder.glob(f"*/student/{MANIFEST}")]
    return max(found)[1] if found else None


def check(names: Sequence[str], revisions: Mapping[str, str | None] | None = None) -> None:
    """Refuse what is no source, before any weight loads: UserError in one line."""
    for name in names:
        folder = student_folder(name)
        family(class_of(name, (revisions or {}).get(name)) if folder is None else read_manifest(folder).pipeline)


def shown(names: Sequence[str]) -> list[str]:
    """Those that get a place of their own: a teacher that stands beside its student needs none; students come first."""
    folders = {name: student_folder(name) for name in names}
    students = [name for name, folder in folders.items() if folder is not None]
    bases = {_place(read_manifest(folder).base) for folder in folders.values() if folder is not None}
    return students + [n for n in folders if n not in students and _place(n) not in bases]


def _place(source: str) -> str:
    """One spelling of a source, however a folder is named."""
    path = Path(resolve(source))
    return str(path.resolve()) if path.is_dir() else source


def load_source(name: str, revision: str | None = None, variant: str | None = None, dtype: str = "fp32") -> Source:
    """Load a source and draw once in the fewest steps: the first call of a process is slow, and times are shown.

    Revision and variant are those of a pipeline's files, or of a student's base.
    """
    folder, loading = student_folder(name), dtypes(dtype)
    if folder is None:
        student, base = None, name
        teacher = Teacher(name, revision, variant, loading=loading)
        denoiser = denoiser_of(teacher.pipeline)
        step_counts: Sequence[int] = TEACHER_STEPS
    else:
        denoiser, manifest = load_student(name, variant=variant, revision=revision, **student_in(dtype))
        student, base = (denoiser, manifest), manifest.base
        try:
            teacher = teacher_of(manifest, negative_prompt(folder), revision, variant, loading)
        except UserError as error:
            raise UserError(f"{name}: its teacher, to be shown beside it, cannot be loaded; {error}") from error
        step_counts = sorted(manifest.plans)
    told = _told(folder) if folder else {}
    guidance = run_guidance(folder) if folder and teacher.guidance_scale else None
    source = Source(
        name=name,
        teacher=teacher,
        student=student,
        step_counts=step_counts,
        many_steps=max(told.get("report_teacher_steps") or [50]),
        guidance_scale=teacher.guidance_scale if guidance is None else guidance,
        prompts=examples(base, told.get("validation_prompts"), denoiser.examples) if denoiser.takes_prompts else [],
        clips=denoiser.clips,
        size=sides(denoiser, student[1] if student else None),
    )
    for label in source.labels[1:]:
        source.sampler(label, step_counts[0], 1, source.guidance_scale).images([*source.prompts, ""][:1], [0])
    return source


def sides(denoiser: Denoiser, manifest: Manifest | None) -> dict[str, int]:
    """Height, width and number of frames of a student's samples, or of its pipeline's; those that the call takes."""
    height, width, frames = (manifest.height, manifest.width, manifest.num_frames) if manifest else (None, None, None)
    found: dict[str, int] = dict(zip(("height", "width"), denoiser.pixels(height, width), strict=True))
    if of_clips := denoiser.frames(frames):
        found["num_frames"] = of_clips[0]
    takes = inspect.signature(type(denoiser.pipeline).__call__).parameters
    return {k: v for k, v in found.items() if k in takes}


def negative_prompt(student: Path) -> str:
    """Of a student's run, where it still lies in one."""
    return str(_told(student).get("negative_prompt") or "")


def run_guidance(student: Path) -> float | None:
    """The teacher's guidance scale in a student's run, where that says one."""
    own = _told(student)
    found = next((v for k in ("validation_guidance_scale", "guidance_scale") if (v := own.get(k)) is not None), None)
    return float(found) if isinstance(found, int | float) else None


def _told(student: Path) -> dict[str, Any]:
    """The config of a student's run, not checked: its method or keys may be another version's, or a user's own."""
    path = student.parent / "config.yaml"
    if student.name != "student" or not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a run's config ({type(error).__name__})") from error
    return values if isinstance(values, dict) else {}


def examples(base: str, previews: Sequence[str] | None = None, usual: Sequence[str] = ()) -> list[str]:
    """Prompts that the model was made for: its run's, and those that the teacher's folder carries; else `usual`, or any."""
    own = list(previews or [])[:4]
    if (carried := Path(resolve(base)) / EXAMPLES).is_file():
        own += read_prompts(str(carried))
    return list(dict.fromkeys(own)) or list(usual or PROMPTS)
