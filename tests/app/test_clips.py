"""Clips as files that play."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch

from fewstep.app.clips import save_mp4


def frames(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What an MP4 says of itself, and its frames (F, H, W, 3)."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader]).astype(int)


def test_an_mp4_shows_its_clip(tmp_path: Path):
    """Flat colours survive but for rounding; sides are made even, which H.264 needs."""
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200]], dtype=torch.uint8)
    clip = colours[:, :, None, None].expand(3, 3, 33, 47)
    meta, played = frames(save_mp4(clip, tmp_path / "a.mp4", 24))
    assert (meta["fps"], meta["codec"], meta["pix_fmt"][:7]) == (24, "h264", "yuv420p")
    assert played.shape == (3, 32, 46, 3)
    assert np.abs(played - colours.numpy()[:, None, None]).max() <= 6
