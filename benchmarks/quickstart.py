"""The figures of a student of the embedded teacher against its teacher at its best, with many samples.

    python benchmarks/quickstart.py runs/quickstart

For each set of prompts and number of steps a sweep over solvers, spacings and guidance scales ranks the teacher's rows
at a small N (by `fd_emoji`). The best of each of the --finalists best guidance scales is drawn at the full N, and the
nearest of these is the teacher's row. All rows are drawn from the same prompts and seeds. Writes
benchmarks/quickstart.md and .json. Every drawn row and every point of the sweep is kept in --cache, so that a run that
was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.distill import picture
from fewstep.distill.console import answer, quiet
from fewstep.distill.evaluation import (
    REFERENCE_SEED,
    Drawn,
    Sampler,
    Teacher,
    draw,
    student_folder,
    student_sampler,
)
from fewstep.distill.prompt_sets import EMBEDDED, PromptSet, prompt_set
from fewstep.distill.report import Comparison, write_json
from fewstep.distill.table import markdown
from fewstep.metrics.emoji.judge import features
from fewstep.metrics.emoji.metrics import CORRECTION_SEED, renderings
from fewstep.metrics.frechet import frechet_distance, frechet_to, moments, stderr
from fewstep.samplers.baseline import SPACINGS
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import load_student

SOLVERS = ("dpmsolver++", "unipc", "ddim")
GOALS = {  # student's steps: (of the teacher's as many steps, of the teacher's most), ratios of corrected fd_emoji
    4: (1.0, 1.1),
    2: (0.5, 1.25),
    1: (0.5, 2.0),
}
RANKED_BY = 2000
"""Real renderings that a sweep's samples are compared with."""

PART = 1000
"""Images of one file of the cache."""

TUNED_ON = {"embedded:emoji/held-out": "embedded:emoji/full"}
"""Sets of prompts that the sweep must not see, and what it uses instead."""

WITHIN = ("clip_emoji", "category_accuracy", "background_accuracy", "coverage")
"""Figures of the student's four steps that are to be within 5% of the teacher's most."""


class Choice(NamedTuple):
    """How a teacher's row is sampled."""

    scheduler: str
    spacing: str
    guidance: float


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


class Cache:
    """What was drawn and swept, by content: another teacher or student has other keys."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: list[Any], ending: str) -> Path:
        return self.folder / f"{sha256(json.dumps(key).encode()).hexdigest()[:24]}.{ending}"

    def number(self, key: list[Any], make: Callable[[], float]) -> float:
        """A number that is computed once."""
        path = self._path(key, "json")
        if not path.is_file():
            text = json.dumps({"key": key, "value": make()})
            path.with_suffix(".tmp").write_text(text)
            path.with_suffix(".tmp").rename(path)  # whole or not at all
        return json.loads(path.read_text())["value"]

    def drawn(self, key: list[Any], sampler: Sampler, prompts: PromptSet) -> Drawn:
        """A row that is drawn once, in parts, since one of many images takes an hour."""
        images, costs = [], []
        for first in range(0, len(prompts), PART):
            path = self._path([*key, prompts.name, len(prompts), first], "safetensors")
            if not path.is_file():
                part = slice(first, first + PART)
                part = dataclasses.replace(
                    prompts, prompts=prompts.prompts[part], groups=prompts.groups[part], seeds=prompts.seeds[part]
                )
                row = draw(sampler, part, 50)
                cost = torch.tensor([row.seconds_per_image, row.nfe])
                save_file({"images": row.images, "cost": cost}, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
            stored = load_file(path)
            images.append(stored["images"])
            costs.append(stored["cost"])
        seconds, nfe = torch.stack(costs).median(0).values.tolist()
        return Drawn(torch.cat(images), seconds, nfe)


def sweep(
    teacher: Teacher, mark: str, name: str, steps: int, options: argparse.Namespace, cache: Cache
) -> list[dict[str, Any]]:
    """All choices with the `fd_emoji` of a small set, best first."""
    tried, name = [], TUNED_ON.get(name, name)
    prompts, ranked_by = (prompt_set(name, n, options.seed) for n in (options.sweep_num, RANKED_BY))
    reference = features(renderings(ranked_by.prompts, REFERENCE_SEED))
    for choice in map(Choice._make, itertools.product(SOLVERS, SPACINGS, options.guidance)):

        def distance(choice: Choice = choice) -> float:
            sampler = teacher.sampler(steps, choice.guidance, choice.scheduler, choice.spacing)
            return frechet_distance(reference, features(draw(sampler, prompts, 50).images))

        value = cache.number([mark, name, len(prompts), len(ranked_by), steps, *choice], distance)
        tried.append({**choice._asdict(), "fd_emoji": value})
        say(f"sweep {name}, {steps} steps, {' '.join(map(str, choice))}: {value:.3f}")
    return sorted(tried, key=lambda entry: entry["fd_emoji"])


def finalists(tried: list[dict[str, Any]], count: int) -> list[Choice]:
    """Of a sweep, best first, the best choice of each of the `count` best guidance scales."""
    best: dict[float, Choice] = {}
    for entry in tried:
        best.setdefault(entry["guidance"], Choice(*(entry[key] for key in Choice._fields)))
    return list(best.values())[:count]


def ratio(student: Tensor, teacher: Tensor, real: Tensor, reference: Tensor) -> tuple[float, float]:
    """r = (fd(student) - fd(real)) / (fd(teacher) - fd(real)) of features to the reference, and its error.

    All four are pictures of the same prompts, student and teacher from the same noise: prompts are drawn with
    replacement. The error is that of student - r teacher over the teacher, which stays finite where the teacher's is small.
    """

    def above(i: Tensor) -> tuple[float, float]:
        distance = frechet_to(moments(reference[i]))
        floor, ours, others = (distance(moments(features[i])) for features in (real, student, teacher))
        return ours - floor, others - floor

    def left(i: Tensor) -> float:
        ours, others = above(i)
        return ours - reached * others

    ours, others = above(torch.arange(len(reference)))
    reached = ours / others
    return reached, stderr(left, len(reference)) / abs(others)


def weights_mark(folder: Path) -> str:
    """A hash of a student's weights."""
    digest = sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def rows(
    run: Path, prompts: PromptSet, options: argparse.Namespace, cache: Cache, swept: dict[str, Any]
) -> Iterator[tuple[Sampler, Drawn]]:
    """Every row of a set of prompts: the teacher's best of each number of steps, then the student's."""
    folder = student_folder(run)
    if folder is None:
        raise UserError(f"{run}: neither a run nor a student's folder")
    student, manifest = load_student(run, fuse=True)
    teacher = Teacher(options.teacher or manifest.base, manifest.revision)
    reference = features(renderings(prompts.prompts, REFERENCE_SEED))
    for steps in options.steps:
        tried = sweep(teacher, manifest.fingerprint, prompts.name, steps, options, cache)
        swept[f"{prompts.name}, {steps} steps"] = tried
        last = []
        for choice in finalists(tried, options.finalists):
            sampler = teacher.sampler(steps, choice.guidance, choice.scheduler, choice.spacing)
            drawn = cache.drawn([manifest.fingerprint, steps, *choice], sampler, prompts)
            last.append((frechet_distance(reference, features(drawn.images)), sampler, drawn))
            say(f"{prompts.name}, {steps} steps, {' '.join(map(str, choice))}: {last[-1][0]:.4f} of {len(prompts)}")
        yield min(last, key=lambda entry: entry[0])[1:]
    for steps in sorted(manifest.plans, reverse=True):
        sampler = student_sampler(student, manifest, str(run), steps)
        yield sampler, cache.drawn([weights_mark(folder), steps], sampler, prompts)


def goals(
    table: list[dict[str, Any]], seen: dict[tuple[str, int], Tensor], prompts: PromptSet, most: int
) -> list[list[str]]:
    """The goals, what was reached, and whether."""
    reference, real = (features(renderings(prompts.prompts, s)) for s in (REFERENCE_SEED, CORRECTION_SEED))
    out = [["goal", "reached", "met"]]
    for steps, (same, many) in GOALS.items():
        for against, bound in ((steps, same), (most, many)):
            if ("student", steps) in seen and ("teacher", against) in seen:
                value, error = ratio(seen["student", steps], seen["teacher", against], real, reference)
                said = f"corrected fd_emoji, student {steps} / teacher {against}: at most {bound:g}"
                out.append([said, f"{value:.2f} ± {error:.2f}", "yes" if value <= bound else "no"])
    by = {(row["role"], row["steps"]): row["metrics"] for row in table}
    if ("student", 4) in by and ("teacher", most) in by:
        for name in WITHIN:
            value = by["student", 4][name]["value"] / by["teacher", most][name]["value"]
            out.append(
                [f"{name}, student 4 / teacher {most}: at least 0.95", f"{value:.3f}", "yes" if value >= 0.95 else "no"]
            )
    return out


def benchmark(options: argparse.Namespace) -> None:
    """Draw, judge, write."""
    quiet()
    cache = Cache(options.cache)
    sets = [prompt_set(name, options.num, options.seed) for name in options.prompts]
    comparison, swept, judged = Comparison(sets, say=say), {}, {}
    for i, prompts in enumerate(sets):
        seen = {}
        for sampler, drawn in rows(options.run, prompts, options, cache, swept):
            comparison.keep(i, sampler, drawn)
            seen[sampler.role, sampler.steps] = features(drawn.images)
        judged[prompts.name] = goals(comparison.rows[i], seen, prompts, max(options.steps))
    report = comparison.report() | {"sweep": swept, "goals": judged}
    write_json(report, options.out.with_suffix(".json"))
    text = [
        f"# {options.run}: student against the teacher's best",
        f"Made by `python benchmarks/quickstart.py {options.run} --num {options.num}`. Teacher rows: the best of "
        f"{', '.join(SOLVERS)}, spacings {', '.join(SPACINGS)} and guidance {', '.join(map(str, options.guidance))}, by "
        f"fd_emoji of {options.sweep_num} samples, then of all with the {options.finalists} best scales. Corrected: less the distance of as many real pictures.",
        markdown(report).strip(),
        *(f"Goals, prompts {name}:\n\n{lines(table)}" for name, table in judged.items()),
        f"The teacher's best settings:\n\n{lines(chosen(report))}",
    ]
    options.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text[2:]))
    if options.picture:
        picture.save(comparison.picture(), options.picture)


def chosen(report: dict[str, Any]) -> list[list[str]]:
    """What the sweeps found."""
    found = [["prompts", "steps", "solver", "guidance"]]
    for block in [report, *report["blocks"]]:
        for row in block["rows"]:
            if row["role"] == "teacher":
                found.append([block["prompts"], str(row["steps"]), row["scheduler"], f"{row['guidance']:g}"])
    return found


def lines(table: list[list[str]]) -> str:
    """A table in markdown."""
    text = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([text[0], "|" + " --- |" * len(table[0]), *text[1:]])


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(kind: type) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser.add_argument("run", type=Path, help="a run or a student's folder")
    parser.add_argument("--teacher", help="default: the student's base")
    parser.add_argument("--num", type=int, default=2000, help="samples of every row")
    parser.add_argument("--sweep-num", type=int, default=128, help="samples of every point of the sweep")
    parser.add_argument("--steps", type=numbers(int), default=[50, 4, 2, 1], help="of the teacher")
    parser.add_argument("--guidance", type=numbers(float), default=[1.0, 1.5, 2.0, 3.0, 4.0], help="of the sweep")
    parser.add_argument("--finalists", type=int, default=2, help="guidance scales whose best is drawn at --num")
    parser.add_argument("--prompts", type=numbers(str), default=list(EMBEDDED), help="sets, the first is the main one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark-quickstart"))
    parser.add_argument("--picture", type=Path, help="of the first images of every row")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    sys.exit(answer(lambda: benchmark(options)))


if __name__ == "__main__":
    main()
