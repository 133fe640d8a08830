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
    if c.dataset_name is not None:
        files = sources.dataset(
            c.dataset_name, c.dataset_config_name, c.dataset_split, c.image_column, c.caption_column
        )
    elif c.train_data not in (None, "embedded:emoji"):
        files = sources.source_of(c.train_data, c.caption_column)
    # where captions alone are read, those of either will do
    opened = bool(c.aspect_ratio_buckets) or "images" in distiller(c.method).needs_of(c)
    if opened and c.has_images and moving is not None:
        _refuse_kind(c, files, moving)
    return files


def _refuse_kind(config: TrainConfig, files: Source | None, moving: bool) -> None:
    """UserError for images where clips are wanted, or the reverse, by the names of the files."""
    where = f"dataset_name {config.dataset_name}" if config.dataset_name else f"train_data {config.train_data}"
    if files is None or config.dataset_name:  # drawings, a column of images
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
