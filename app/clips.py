"""Clips as files that play: MP4 for a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio_ffmpeg
from torch import Tensor


def save_mp4(clip: Tensor, path: Path, frames_per_second: float) -> Path:
    """Write frames (F, 3, H, W) uint8 as H.264 that browsers play; an odd row or column is left out."""
    height, width = (side // 2 * 2 for side in clip.shape[-2:])  # colours are kept for blocks of 2x2
    frames = clip[:, :, :height, :width].permute(0, 2, 3, 1).contiguous().numpy()
    rate: Any = frames_per_second  # annotated as an int there, and passed on to ffmpeg as it is
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=rate, quality=8, macro_block_size=2, ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    return path
