"""Files of clips: what was saved is read, and what is no clip is refused by name."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from PIL import Image

from fewstep.metrics.clips import batches, clip_paths, read_clip
from tests.metrics.tiny_clip import noise_images


def pictures(clip: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in clip]


def save(clip: torch.Tensor, path: Path) -> Path:
    """A clip (F, 3, H, W) as the suffix says; without one as a folder of frames."""
    first, *rest = pictures(clip)
    if path.suffix == ".mp4":
        size = (clip.shape[-1], clip.shape[-2])
        writer = imageio_ffmpeg.write_frames(
            str(path), size, fps=7, quality=10, macro_block_size=2, ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():
            writer.send(frame)
        writer.close()
    elif path.suffix:
        first.save(
            path,
            save_all=True,
            append_images=rest,
            duration=100,
            **({"lossless": True} if path.suffix == ".webp" else {}),
        )
    else:
        path.mkdir()
        for number, frame in enumerate([first, *rest]):
            frame.save(path / f"{number:03}.png")
    return path


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """Four frames of few colours, so that a palette loses nothing."""
    return (noise_images(4, 32, 48) // 128 * 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif", "a"])
def test_lossless_files_are_read_as_they_were(clip, tmp_path, name):
    assert torch.equal(read_clip(save(clip, tmp_path / name)), clip)


def test_videos_have_all_of_their_frames_in_order(tmp_path):
    """Levels that rise by 12 a frame, through H.264; the tenth is near to none but the tenth."""
    levels = 12 * torch.arange(20)
    clip = levels.view(20, 1, 1, 1).expand(20, 3, 32, 48).to(torch.uint8)
    found = read_clip(save(clip, tmp_path / "a.mp4"))
    assert found.shape == clip.shape
    assert (found.float().mean((1, 2, 3)) - levels).abs().max() < 4


def test_a_folder_is_read_by_name_in_batches_of_one_shape(clip, tmp_path):
    """Two alike, one shorter, one wider; hidden files are left out."""
    made = [clip, clip.flip(0), clip[:3], clip[..., :40]]
    for name, one in zip(("a.webp", "b", "c.gif", "d.png"), made, strict=True):
        save(one, tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert [path.name for path in clip_paths(tmp_path)] == ["a.webp", "b", "c.gif", "d.png"]
    whole = list(batches(tmp_path))
    assert [tuple(x.shape[:2]) for x in whole] == [(2, 4), (1, 3), (1, 4)]
    assert all(torch.equal(x, y) for x, y in zip((x for part in whole for x in part), made, strict=True))
    assert [len(x) for x in batches(tmp_path, size=1)] == [1, 1, 1, 1]
    assert [len(x) for x in batches(clip.expand(5, -1, -1, -1, -1), size=2)] == [2, 2, 1]


def test_what_is_no_clip_is_refused_by_name(clip, tmp_path):
    single = save(clip[:1], tmp_path / "single.png")
    broken = save(clip, tmp_path / "broken.gif")
    broken.write_bytes(broken.read_bytes()[:100])
    video = tmp_path / "text.mp4"
    video.write_text("not a video")
    uneven = save(clip, tmp_path / "uneven")
    pictures(clip[..., :40])[0].save(uneven / "009.png")
    mixed = save(clip, tmp_path / "mixed")
    (mixed / "notes.txt").write_text("")
    for path, line in (
        (single, "single.png: 1 frame, and a clip has two or more"),
        (broken, "broken.gif: cannot be read as a clip"),
        (video, "text.mp4: cannot be read as a clip"),
        (uneven, "uneven: frames of 2 sizes"),
        (mixed, "mixed: cannot be read as a clip: notes.txt is no frame"),
        (tmp_path / "none.gif", "none.gif: cannot be read as a clip"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            read_clip(path)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "notes.txt").write_text("")  # stands beside clips, as a caption does
    (tmp_path / "notes.pdf").write_text("")
    with pytest.raises(ValueError, match=r"notes.pdf: not a clip; a folder of clips holds .mp4"):
        list(batches(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clips"):
        list(batches(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no such folder of clips"):
        list(batches(tmp_path / "nowhere"))
