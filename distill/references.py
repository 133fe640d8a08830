"""What rows are compared with: a folder of images or clips, or a published file of their mean and covariance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.distill.judges import Judges, refusals
from fewstep.distill.metric_names import CLIP_SPACES, FRECHET, METRICS, fewest
from fewstep.distill.seen import Seen
from fewstep.metrics import clips, images
from fewstep.metrics.features import Features, Kept, Read, extract
from fewstep.metrics.frechet import Gaussian, moments
from fewstep.metrics.images import image_files
from fewstep.metrics.statistics import Statistics, cached, load
from fewstep.metrics.video import OfLength
from fewstep.samplers.errors import UserError

CACHE = Path("~/.cache/fewstep/statistics")
"""Where moments of folders are kept."""
CLIPS = 8
"""Clips in memory at once: 81 frames of 480x832 are 0.1 GB."""


def read_reference(source: str, names: Sequence[str], judges: Judges, cache: Path, batch: int = 32) -> Seen:
    """The reference of a folder of images or clips, or of a file of mu and sigma.

    Moments of a folder are cached under the hash of its images and the name of the feature space.

    Raises:
        UserError: neither of the two, or a file where figures need the images.
    """
    needy = [n for n in names if "reference" in METRICS[n].needs]
    moment_spaces, kept_spaces = judges.frechet_spaces(needy), judges.kept_spaces(needy)
    path = Path(source)
    if path.suffix == ".npz" and not path.is_dir():
        lacking = [n for n in needy if n not in FRECHET]
        if lacking:
            raise UserError(
                f"metric {lacking[0]}: needs the images of the reference, and {source} holds mu and sigma alone; "
                "say --reference FOLDER"
            )
        return _published(load_statistics(path), moment_spaces, judges, source)
    if not path.is_dir():
        raise UserError(f"--reference {source}: neither a folder of images, nor a .npz of mu and sigma, nor teacher")
    with refusals():
        moving = {name: "clips" in METRICS[name].needs for name in needy}
        counts = {m: len(clips.clip_paths(path) if m else image_files(path)) for m in dict.fromkeys(moving.values())}
        for name in needy:
            if (n := counts[moving[name]]) < (least := 2 if name in FRECHET else fewest(name)):
                raise UserError(f"--reference {source}: holds {n} of {least} or more that {name} needs")
        kept = {s: _keep(judges, s, path, batch) for s in kept_spaces}
        found: dict[str, Gaussian] = {s: moments(kept[s].tensor()) for s in moment_spaces if s in kept}
        for space in set(moment_spaces) - set(found):
            features, files, read = readable(judges, space, path)
            some = min(batch, CLIPS) if space == "i3d" else batch
            found[space] = cached(features, files, cache, some, read)
    return Seen(kept=kept, published=found)


def readable(judges: Judges, space: str, folder: str | Path) -> tuple[Features, list[Path], Read]:
    """A feature space, a folder's images or clips for it, and how these are read."""
    features = judges.space(space)
    if space not in CLIP_SPACES:
        return features, image_files(folder), images.batches
    files = clips.clip_paths(folder)
    if space == "frames":
        return features, files, clips.frames
    return OfLength(features, len(clips.read_clip(files[0]))), files, clips.batches


def load_statistics(path: Path) -> Statistics:
    """A file of mu and sigma; UserError where it is none."""
    with refusals():
        return load(path)


def _published(known: Statistics, spaces: Sequence[str], judges: Judges, source: str) -> Seen:
    for space in spaces:
        name = judges.space(space).name
        # clips of another length are refused when figures are read
        if known.features and not (known.features == name or known.features.startswith(f"{name}-")):
            raise UserError(f"{source}: statistics of {known.features}; this evaluation needs {name}")
        if not known.features and (width := _width(judges, space)) != len(known.mean):
            raise UserError(f"{source}: mu of {len(known.mean)} features; {name} has {width}")
    return Seen(published=dict.fromkeys(spaces, known))


def _width(judges: Judges, space: str) -> int:
    """Features of a space: of a grey image, or a grey clip of 16 frames."""
    shape = (1, 16, 3, 64, 64) if space == "i3d" else (1, 3, 64, 64)
    return judges.space(space)(torch.full(shape, 128, dtype=torch.uint8)).shape[1]


def _keep(judges: Judges, space: str, folder: Path, batch: int) -> Kept:
    kept = Kept(judges.space(space).name)
    kept.update(extract(judges.space(space), folder, batch))
    return kept
