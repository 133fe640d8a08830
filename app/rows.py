"""Rows of an evaluation: images on disk, and what is known of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.app.processes import Processes
from fewstep.app.store import Cost, Store
from fewstep.distill.prompt_sets import PromptSet
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
    """

    row: dict[str, Any]
    files: list[Path]
    prompts: Sequence[str] | None = None
    groups: Sequence[int] | None = None
    same_noise: bool = False
    scores: Scores = field(default_factory=Scores)

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


def folder_row(source: str, clips: bool = False) -> Row:
    """A folder of ready images; their prompts stand in NAME.txt beside each, or are not known."""
    files = clip_paths(source) if clips else image_files(source)
    if len(files) < 2:
        raise UserError(f"{source}: holds {len(files)} image; figures need two or more")
    sidecars = [f.with_suffix(".txt") for f in files]
    prompts = None
    if all(s.is_file() for s in sidecars):
        prompts = [s.read_text(encoding="utf-8").strip() for s in sidecars]
    groups = None
    if prompts:
        numbers = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        groups = [numbers[p] for p in prompts]
    row = {"source": source, "role": "folder", "steps": 0, "nfe": None, "guidance": None, "scheduler": None}
    return Row(row | {"seconds_per_image": None, "n": len(files)}, files, prompts, groups)


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
