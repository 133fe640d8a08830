"""The artifact of several students: one folder with a router and a student a part, each of which loads alone."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import load_student, resolve
from fewstep.samplers.manifest import MANIFEST, Manifest, read_manifest
from fewstep.samplers.router import ROUTER, Router
from fewstep.samplers.student import replacing


def member(part: int) -> str:
    """Folder of a student."""
    return f"student_{part}"


def students_of(source: str | Path) -> list[Path]:
    """Folders of the students of a run, or of an artifact, by part; none where it is not of several."""
    folder = Path(resolve(source))
    parts = read_manifest(folder).parts if (folder / MANIFEST).is_file() else None
    return [folder / member(part) for part in range(parts or 0)]


def save_several(folder: Path, students: Sequence[Path], router: Router, masses: Sequence[float]) -> None:
    """Write the artifact from the students' own; what stands in `folder` is replaced at the end.

    Args:
        folder: a run's `student`, or another.
        students: folders of the students, by part.
        router: of as many parts.
        masses: share of the prompts of each part, for the card.
    """
    manifests = [read_manifest(path) for path in students]
    with replacing(folder) as new:
        for part, (path, manifest) in enumerate(zip(students, manifests, strict=True)):
            shutil.copytree(path, new / member(part))
            own = manifest.model_copy(update={"part": part, "router": router.sha256})
            (new / member(part) / MANIFEST).write_text(own.model_dump_json(indent=2) + "\n")
        router.save(new / ROUTER)
        whole = manifests[0].model_copy(update={"parts": len(students), "router": router.sha256})
        (new / MANIFEST).write_text(whole.model_dump_json(indent=2) + "\n")
        (new / "README.md").write_text(card(whole, masses))


def card(manifest: Manifest, masses: Sequence[float]) -> str:
    """The README.md: what the folder is, and the lines that draw with it."""
    shares = "\n".join(f"| [`{member(i)}`]({member(i)}) | {mass:.1%} |" for i, mass in enumerate(masses))
    counts = ", ".join(map(str, sorted(manifest.plans)))
    steps = max(manifest.plans)
    return f"""# {len(masses)} students of `{manifest.base}`

Each takes a part of the prompts in {counts} steps ({manifest.pipeline}, method `{manifest.method}`); `{ROUTER}` says which. For
one image one of them is called, as fast as a single student.

| student | share of the training's prompts |
|---|---|
{shares}

Each loads alone in plain diffusers: its folder has the lines. All together, a batch of any prompts:

```
fewstep sample . -p "a prompt" --steps {steps}
```
"""


def load_several(folder: Path, manifest: Manifest, **arguments: Any) -> Denoiser:
    """The denoiser that asks each row's own student; autoencoder and text encoders are held once.

    Args:
        folder: of the artifact.
        manifest: its own.
        arguments: of `load_student`, for every member.

    Raises:
        UserError: another router than the students were trained with, a student in another's place.
    """
    router = Router.load(folder / ROUTER)
    if router.sha256 != manifest.router or router.parts != manifest.parts:
        raise UserError(f"{folder / ROUTER}: not the router that these students were trained with")
    students: list[Denoiser] = []
    shared: dict[str, Any] = {}
    for part in range(router.parts):
        own = read_manifest(folder / member(part))
        if (own.part, own.router) != (part, manifest.router):
            raise UserError(f"{folder / member(part)}: trained for part {own.part}, or with another router")
        student, _ = load_student(folder / member(part), **{**arguments, **shared})
        students.append(student)
        if not shared:
            one = (*student.network_names, "scheduler")
            shared = {k: v for k, v in student.pipeline.components.items() if k not in one and v is not None}
    several = copy.copy(students[0])
    several.networks = {member(i): student.network for i, student in enumerate(students)}
    several.router = router
    return several
