"""`fewstep stats`: the reference of a Frechet distance as a file."""

from __future__ import annotations

from pathlib import Path

from fewstep.distill import checkpoint
from fewstep.distill.evaluation import bar, device
from fewstep.distill.judges import Judges, refusals
from fewstep.distill.metric_names import CLIP_SPACES, SPACES, Weights
from fewstep.distill.references import readable
from fewstep.metrics.features import each
from fewstep.metrics.frechet import Running
from fewstep.metrics.statistics import content_hash, of_state, save
from fewstep.samplers.errors import UserError


def stats(folder: str, out: Path, space: str, batch_size: int, weights: Weights) -> str:
    """Write mean and covariance of a folder's images or clips in a feature space; a line that says so."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: must end in .npz")
    if space not in (known := SPACES + CLIP_SPACES):
        raise UserError(f"--space {space}: unknown; known: {', '.join(known)}")
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    what = "clip" if space in CLIP_SPACES else "image"
    with refusals():
        features, files, read = readable(Judges(weights, device()), space, folder)
        if len(files) < 2:
            raise UserError(f"{folder}: holds {len(files)} {what}; statistics need two or more")
        state = Running(features.name, groups=1)
        with bar(len(files), f"{folder}, {features.name}") as progress:
            for found in each(features, files, batch_size, read):
                state.update(found)
                if progress is not None:
                    progress(len(found))
        with checkpoint.writing(out, "name another file"):
            save(of_state(state, content_hash(files)), out)
    return f"{out}: {len(files)} {what}s, {features.name}"
