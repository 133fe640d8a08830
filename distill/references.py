"""What rows are compared with: a folder of images or clips, or a published file of their mean and covariance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.distill.judges import Judges, one_line
from fewstep.distill.metric_names import FRECHET, METRICS
from fewstep.distill.seen import Seen, see
from fewstep.metrics.features import Kept, extract
from fewstep.metrics.frechet import Gaussian, moments
from fewstep.metrics.statistics import Statistics, cached, load
from fewstep.samplers.errors import UserError

CACHE = Path("~/.cache/fewstep/statistics")
"""Where moments of folders are kept."""


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
    with one_line():
        if any("clips" in METRICS[n].needs for n in needy):
            return _clips(path, needy, judges)
        kept = {s: _keep(judges, s, path, batch) for s in kept_spaces}
        found: dict[str, Gaussian] = {s: moments(kept[s].tensor()) for s in moment_spaces if s in kept}
        for space in set(moment_spaces) - set(found):
            found[space] = cached(judges.space(space), path, cache, batch)
    return Seen(kept=kept, published=found)


def load_statistics(path: Path) -> Statistics:
    """A file of mu and sigma; UserError where it is none."""
    with one_line():
        return load(path)


def _published(known: Statistics, spaces: Sequence[str], judges: Judges, source: str) -> Seen:
    for space in spaces:
        name = judges.space(space).name
        if known.features and known.features != name:
            raise UserError(f"{source}: statistics of {known.features}; this evaluation needs {name}")
    return Seen(published=dict.fromkeys(spaces, known))


def _keep(judges: Judges, space: str, folder: Path, batch: int) -> Kept:
    kept = Kept(judges.space(space).name)
    kept.update(extract(judges.space(space), folder, batch))
    return kept


def _clips(folder: Path, names: Sequence[str], judges: Judges) -> Seen:
    from fewstep.metrics import clips

    seen, done = Seen(), 0
    for some in clips.batches(folder):
        see(seen, some, range(done, done + len(some)), names, judges)
        done += len(some)
    return seen
