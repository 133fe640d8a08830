"""Where a config's images or clips are, and whether they are what its teacher makes."""

from __future__ import annotations

from fewstep.distill import clips, pictures, sources
from fewstep.distill.config import TrainConfig
from fewstep.distill.methods import distiller
from fewstep.distill.sources import Source, some
from fewstep.samplers.errors import UserError


def source(config: TrainConfig, moving: bool | None = None) -> Source | None:
    """Where the images or clips of a config are; None where it names none, or embedded ones.

    Args:
        config: the run's.
        moving: whether its teacher makes clips; None: not asked.

    Raises:
        UserError: they are not there, or are images where the run is to learn from clips, or clips from images.
    """
    c, files = config, None
    # where captions alone are read, those of either will do
    opened = moving is not None and (bool(c.aspect_ratio_buckets) or "images" in distiller(c.method).needs_of(c))
    if c.dataset_name is not None:
        column = (c.video_column if moving else c.image_column) if opened else None
        return sources.dataset(
            c.dataset_name, c.dataset_config_name, c.dataset_split, c.caption_column, column, bool(moving)
        )
    if c.train_data not in (None, "embedded:emoji"):
        files = sources.source_of(c.train_data, c.caption_column)
    if opened and c.has_images:
        _refuse_kind(f"train_data {c.train_data}", files, bool(moving))
    return files


def _refuse_kind(where: str, files: Source | None, moving: bool) -> None:
    """UserError for images where clips are wanted, or the reverse, by the names of the files."""
    if files is None:  # drawings
        if moving:
            raise UserError(
                f"{where}: holds images; this teacher makes clips: train_data must be a folder or shards of them"
            )
        return
    wanted = (clips if moving else pictures).SUFFIXES
    wrong = [name for name in files.names if not name.lower().endswith(wanted)]
    if wrong:
        theirs, ours = ("images", "clips") if moving else ("clips", "images")
        raise UserError(
            f"{where}: {len(wrong)} of {len(files.names)} are {theirs}, e.g. {some(wrong, 1)}; this teacher makes {ours}, "
            f"and learns from {ours} ({', '.join(wanted)})"
        )
