"""Rows of an evaluation: images on disk, and what is known of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.app.processes import Processes
from fewstep.app.store import Cost, Store, read
from fewstep.distill.metric_names import GIVEN, METRICS, fewest
from fewstep.distill.prompt_sets import PromptSet
from fewstep.distill.report import COLUMNS
from fewstep.distill.sources import read_text
from fewstep.distill.table import labels
from fewstep.metrics.clips import clip_paths
from fewstep.metrics.images import image_files
from fewstep.metrics.scores import Scores
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import resolve
from fewstep.samplers.manifest import MANIFEST


@dataclass
class Row:
    """One line of the table.

    Attributes:
        row: as report.json has it.
        files: the images, in order.
        prompts: of the images; None where nobody knows.
        groups: number of each image's prompt.
        same_noise: whether image i is drawn from the noise that image i of the others is drawn from.
        scores: values of single images and prompts.
        clips: whether the files are clips: the name does not tell, a GIF, PNG or WebP may be either.
        lacks: lines on figures that a folder has no prompts for.
        frames_per_second: of clips, where they are shown.
    """

    row: dict[str, Any]
    files: list[Path]
    prompts: Sequence[str] | None = None
    groups: Sequence[int] | None = None
    same_noise: bool = False
    scores: Scores = field(default_factory=Scores)
    clips: bool = False
    lacks: Sequence[str] = ()
    frames_per_second: float = 16.0

    def images(self, numbers: Iterable[int]) -> Tensor:
        """Images (N, 3, H, W) or clips (N, F, 3, H, W) of these numbers, of one size, uint8."""
        return read([self.files[i] for i in numbers], self.clips)

    def given(self) -> set[str]:
        """What this row has for figures that need it."""
        found = {"prompts"} if self.prompts else set()
        return found | ({"variants"} if self.groups and len(set(self.groups)) < len(self.groups) else set())

    def members(self) -> dict[int, list[int]]:
        """Images of each prompt."""
        found: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(self.groups or []):
            found[group].append(i)
        return dict(sorted(found.items()))


def is_images(source: str) -> bool:
    """Whether a source is a folder of ready images: one without the files that runs, students and pipelines have."""
    folder = Path(resolve(source))
    others = ("model_index.json", "config.yaml", "config.json", MANIFEST)
    return folder.is_dir() and not any((folder / name).is_file() for name in others)


def folder_row(source: str, names: Sequence[str]) -> Row:
    """A folder of ready images or clips; their prompts stand in NAME.txt beside each, or are not known.

    Raises:
        UserError: too few images for a figure, or no prompts for any of the figures.
    """
    clips = any("clips" in METRICS[n].needs for n in names)
    files = clip_paths(source) if clips else image_files(source)
    if len(files) < 2:
        raise UserError(f"{source}: holds {len(files)} image; figures need two or more")
    for name in (n for n in names if len(files) < fewest(n)):
        raise UserError(f"{source}: holds {len(files)} images; {name} needs {fewest(name)} or more")
    texts = [read_text(t, "prompt").strip() if (t := f.with_suffix(".txt")).is_file() else "" for f in files]
    prompts = texts if all(texts) else None
    numbers = {p: i for i, p in enumerate(dict.fromkeys(prompts or []))}
    groups = [numbers[p] for p in prompts] if prompts else None
    row = {"source": source, "role": "folder", "steps": 0, "nfe": None, "guidance": None, "scheduler": None}
    found = Row(row | {"seconds_per_image": None, "n": len(files)}, files, prompts, groups, clips=clips)
    if lacking := [n for n in names if METRICS[n].needs & {"prompts", "variants"} - found.given()]:
        line = f"{', '.join(lacking)}: no two images have one prompt"
        if prompts is None:
            first = next(f for f, text in zip(files, texts, strict=True) if not text)
            line = f"{', '.join(lacking)}: needs {GIVEN['prompts']}, and {first} has none"
        if lacking == list(names):
            raise UserError(f"{source}: {line}")
        found.lacks = [line]
    return found


def real_row(root: Path, prompts: PromptSet, seed: int, processes: Processes) -> Row:
    """Real renderings of the embedded prompts: what a perfect model would get."""
    from fewstep.metrics.emoji.metrics import renderings

    store = Store(root, Path("real/renderings"), {"seed": seed, "prompts": prompts.prompts}, len(prompts))
    if processes.first and store.missing(len(prompts)):
        store.add(range(len(prompts)), renderings(prompts.prompts, seed), Cost(len(prompts), 0.0, 0, None))
    processes.wait()
    row = {"source": "real renderings", "role": "reference", "steps": 0, "nfe": 0, "guidance": None}
    row |= {"scheduler": None, "seconds_per_image": None, "n": len(prompts)}
    return Row(row, store.files, prompts.prompts, prompts.groups)


def grid(rows: Sequence[Row]) -> tuple[list[tuple[str, str, Tensor]], list[str]]:
    """Rows and heads of the picture: the first images of each row, which share prompts and noise."""
    lines = []
    for row, said in zip(rows, labels([row.row for row in rows]), strict=True):
        guided = f"\nguidance {row.row['guidance']:g}" if row.row["role"] == "teacher" else ""
        lines.append((said, f"{row.row['scheduler']}{guided}", row.images(range(min(COLUMNS, len(row.files))))))
    return lines, list(rows[0].prompts or [])[:COLUMNS]
