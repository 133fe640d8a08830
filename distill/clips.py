"""Files to clips: the first frames at a teacher's own rate, as RGB in 0..1; what cannot be is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any

import imageio_ffmpeg
import torch
from torch import Tensor

from fewstep.distill.pictures import Unusable, fitted
from fewstep.metrics.clips import VIDEOS
from fewstep.samplers.errors import UserError

SUFFIXES = (*VIDEOS, ".gif")
"""What counts as a clip; a .gif may be an image too."""


def clip(data: bytes, name: str, size: tuple[int, int], frames: int, rate: float) -> Tensor:
    """The beginning of a file's clip, each frame resized to cover a size and cropped around the centre.

    Things move as fast as in what the teacher makes: of a file with more frames a second those nearest to the times
    0, 1 / rate, 2 / rate, ... are taken. Spread over the whole file they would show a long one in a rush. Of a file with
    fewer all are taken: none is shown twice.

    Args:
        data: the file.
        name: what a message calls it.
        size: height and width.
        frames: F, how many.
        rate: frames a second.

    Returns:
        (F, 3, height, width) in 0..1.

    Raises:
        Unusable: no clip, torn, too short, or too small (`fitted`).
    """
    from PIL import Image

    # frame n is taken where the middle between it and the next (as far away as the last one) is not before its time; of two
    # as near the first, though containers round times to milliseconds
    middle = "t+if(n,t-prev_t,0)/2+0.001"
    nearest = f"setpts=PTS-STARTPTS,select='gte({middle},selected_n/{rate:g})'"
    options = ["-vf", nearest, "-fps_mode", "passthrough", "-frames:v", str(frames)]
    with _decoded(data, name, options) as ((height, width), decoded):
        found = [fitted(Image.frombytes("RGB", (width, height), frame), size, name) for frame in decoded]
    if len(found) < frames:
        raise Unusable(
            f"{name}: is too short, {len(found)} of {frames} frames at {rate:g} a second (num_frames, clip_fps)"
        )
    return torch.stack(found)


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of a file's frames as they are shown, turned as their camera says."""
    with _decoded(data, name, ["-frames:v", "1"]) as (size, _):
        return size


@contextmanager
def _decoded(data: bytes, name: str, options: Sequence[str]) -> Iterator[tuple[tuple[int, int], Iterator[bytes]]]:
    """Height and width of the frames that ffmpeg makes of a file, and the frames; what is transparent is white."""
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # else it warns of each clip that was filmed upright
    with NamedTemporaryFile() as file:  # a clip's head may stand at its end: ffmpeg wants to seek
        file.write(data)
        file.flush()
        decoded: Any = imageio_ffmpeg.read_frames(file.name, output_params=list(options))
        try:
            width, height = next(decoded)["size"]
            yield (height, width), decoded
        except UserError:
            raise
        except Exception as error:  # the decoder raises whatever it stumbles over, with all that ffmpeg said
            said = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise Unusable(f"{name}: cannot be read as a clip ({said})") from error
        finally:
            decoded.close()
