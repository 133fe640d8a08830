"""Folders and files of clips as uint8 tensors: animated GIF, WebP and PNG, videos, or a folder of frames for each clip.

Videos are decoded by the ffmpeg that imageio-ffmpeg brings, every frame that the file has. A file that is no clip is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.metrics.images import SIDECARS

VIDEOS = (".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of the frames in a folder that is one clip; they are taken in the order of their names."""

Source = Tensor | str | Path | Sequence[str | Path]
"""Clips (N, F, 3, H, W) uint8; a folder of clips; or clips in the order wanted, each a file or a folder of frames."""


def clip_paths(folder: str | Path) -> list[Path]:
    """Clips of a folder by name: files that end in `VIDEOS` or `ANIMATIONS`, and folders of frames.

    Files that end in `SIDECARS` and hidden ones are left out, as beside images; others are refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of clips")
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in shown if path.is_dir() or path.suffix.lower() not in SIDECARS]
    for path in found:
        if path.is_file() and path.suffix.lower() not in VIDEOS + ANIMATIONS:
            known = ", ".join(VIDEOS + ANIMATIONS)
            raise ValueError(f"{path}: not a clip; a folder of clips holds {known}, and folders of frames")
    if not found:
        raise ValueError(f"{folder}: holds no clips")
    return found


def read_clip(path: str | Path) -> Tensor:
    """One clip, (F, 3, H, W) uint8, of two frames at least. Raises ValueError with the path and the reason."""
    path = Path(path)
    try:
        if path.is_dir():
            frames = [_still(file) for file in _frame_files(path)]
        elif path.suffix.lower() in VIDEOS:
            frames = _video(path)
        else:
            frames = _pictures(path)
    except Exception as error:  # damaged files make the decoders raise whatever they stumble over
        raise ValueError(
            f"{path}: cannot be read as a clip: {str(error) or type(error).__name__}".splitlines()[0]
        ) from error
    sizes = {frame.shape for frame in frames}
    if len(frames) < 2 or len(sizes) > 1:
        reason = (
            f"frames of {len(sizes)} sizes" if len(sizes) > 1 else f"{len(frames)} frame, and a clip has two or more"
        )
        raise ValueError(f"{path}: {reason}")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def batches(source: Source, size: int = 8) -> Iterator[Tensor]:
    """Clips in order, (B, F, 3, H, W) uint8, B at most `size`; where length or size changes a new batch begins."""
    if isinstance(source, Tensor):
        if source.ndim != 5 or source.dtype != torch.uint8:
            raise ValueError(f"clips must be (N, F, 3, H, W) uint8; got {tuple(source.shape)} {source.dtype}")
        yield from source.split(size)
        return
    alike: list[Tensor] = []
    for path in clip_paths(source) if isinstance(source, str | Path) else source:
        clip = read_clip(path)
        if alike and (len(alike) == size or clip.shape != alike[0].shape):
            yield torch.stack(alike)
            alike = []
        alike.append(clip)
    if alike:
        yield torch.stack(alike)


def frames(source: Source, size: int = 64) -> Iterator[Tensor]:
    """All frames of all clips in order, (B, 3, H, W) uint8, B at most `size`, of one clip each."""
    for clip in batches(source, 1):
        yield from clip[0].split(size)


def _frame_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for file in files:
        if file.suffix.lower() not in FRAMES:
            raise ValueError(f"{file.name} is no frame; frames end in {', '.join(FRAMES)}")
    return files


def _still(file: Path) -> np.ndarray:
    pictures = _pictures(file)
    if len(pictures) > 1:
        raise ValueError(f"{file.name} is an animation, and not one frame of it")
    return pictures[0]


def _pictures(path: Path) -> list[np.ndarray]:
    """Frames (H, W, 3) of a file; what is transparent is shown over white."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        layers = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    return [np.array(Image.alpha_composite(Image.new("RGBA", x.size, "white"), x).convert("RGB")) for x in layers]


def _video(path: Path) -> list[np.ndarray]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24", output_params=["-fps_mode", "passthrough"])
    width, height = next(reader)["size"]
    return [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
