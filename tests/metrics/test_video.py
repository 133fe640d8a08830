"""Figures of clips: still clips, patterns that move as told, and the networks beside their plain use."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fewstep.metrics.clip import Clip
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.scores import Scores
from fewstep.metrics.video import (
    I3D,
    Raft,
    consistency,
    dynamic,
    flow_motion,
    frame_features,
    frame_fid,
    fvd,
    motion,
)
from tests.metrics.tiny_clip import noise_images, save_tiny_clip


def rolled(image: torch.Tensor, dx: int, dy: int, frames: int = 5) -> torch.Tensor:
    """A clip of a picture (3, H, W) that wanders over a torus."""
    return torch.stack([image.roll((i * dy, i * dx), (1, 2)) for i in range(frames)])


def searched(frames: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The shift on a torus, of 6 pixels at most, that carries frames over best, by trying all."""
    shifts = [(dx, dy) for dx in range(-6, 7) for dy in range(-6, 7)]
    errors = [(frames.roll((dy, dx), (2, 3)).float() - following).abs().mean((1, 2, 3)) for dx, dy in shifts]
    best = torch.tensor(shifts)[torch.stack(errors).argmin(0)].float()
    return best.view(-1, 2, 1, 1).expand(-1, 2, *frames.shape[2:])


STILL, SLOW, FAST = (rolled(noise_images(1, 32, 40)[0], *step) for step in ((0, 0), (0, -2), (3, 4)))
CLIPS = torch.stack([STILL, SLOW, FAST])


def test_motion_of_patterns_that_move_as_told():
    """A ramp of 3 levels a pixel that moves by s: 3 s everywhere; a flash of 100 in one of 4 steps: twice 100 over 4."""
    ramp = torch.stack([3 * (torch.arange(40) + 2 * i) for i in range(5)]).view(5, 1, 1, 40).expand(5, 3, 8, 40)
    flash = torch.zeros(5, 3, 8, 40)
    flash[2] = 100
    clips = torch.stack([ramp, flash, torch.full_like(flash, 7)]).to(torch.uint8)
    assert motion(clips).tolist() == [6, 50, 0]
    assert flow_motion(searched, CLIPS).tolist() == pytest.approx([0, 2, 5])


def test_a_still_clip_is_consistent_and_a_changing_one_less_so(tmp_path):
    clip = Clip(str(save_tiny_clip(tmp_path)), batch=4)
    cut = torch.cat([STILL[:2], noise_images(3, 32, 40, seed=5)])  # another picture in each of the last three steps
    features = frame_features(clip, torch.stack([STILL, cut]))
    values = consistency(features)
    assert values[0].item() == pytest.approx(1, abs=1e-5)
    assert values[1].item() < 0.9
    single = [clip(frame[None])[0].double() for frame in cut]
    cosines = [(a @ b / math.sqrt(a @ a * (b @ b))).item() for a, b in pairwise(single)]
    assert values[1].item() == pytest.approx(sum(cosines) / 4, abs=1e-4)


def test_dynamic_degree_counts_steps_of_the_fastest_pixels():
    """32 pixels: 6 * 32 / 256 = 0.75 a step, of 5% of 32 x 40 pixels = 64, in a quarter of 16 frames = 4 steps."""

    def told(frames: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        return torch.stack([following[:, 0] / 100, torch.zeros(len(frames), 32, 40)], 1)

    def moving(steps: int, pixels: int, level: int) -> torch.Tensor:
        clip = torch.zeros(16, 3, 32 * 40)
        clip[1 : 1 + steps, 0, :pixels] = level
        return clip.view(16, 3, 32, 40)

    cases = [(4, 64, 76), (3, 1280, 255), (4, 63, 76), (15, 64, 74), (15, 32, 151), (4, 1280, 152)]
    clips = torch.stack([moving(*case) for case in cases]).to(torch.uint8)
    assert dynamic(told, clips).tolist() == [1, 0, 0, 0, 1, 1]
    assert dynamic(told, clips, fps=4).tolist() == [0, 0, 0, 0, 0, 1]  # 1.5 a step
    tripled = clips.repeat_interleave(3, 1)[:, :-2]  # every frame thrice but for the last
    assert dynamic(told, tripled, fps=24).tolist() == [1, 0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="less than two frames at 8 fps"):
        dynamic(told, clips[:, :3], fps=24)
    assert dynamic(searched, CLIPS).tolist() == [0, 1, 1]


def level_and_change(clips: torch.Tensor) -> torch.Tensor:
    frames = clips.float().mean((2, 3, 4))
    return torch.stack([frames[:, 0], frames[:, -1] - frames[:, 0]], 1)


def flat_clips(levels: list[int], changes: list[int]) -> torch.Tensor:
    """Two frames of one grey level each."""
    pairs = torch.tensor([[level, level + change] for level, change in zip(levels, changes, strict=True)])
    return pairs.to(torch.uint8).view(-1, 2, 1, 1, 1).expand(-1, 2, 3, 4, 4)


def test_frechet_distances_of_clips_and_of_frames():
    """Levels moved by 7 and changes doubled: 49 + (mean 10 -> 20)^2 + (sd 10 -> 20)^2; frames know no order."""
    reference = flat_clips([50, 50, 100, 100], [0, 20, 0, 20])
    clips = flat_clips([57, 57, 107, 107], [0, 40, 0, 40])
    sd = math.sqrt(400 / 3)
    assert fvd(level_and_change, clips, reference) == pytest.approx(49 + 100 + sd**2, rel=1e-6)
    assert fvd(level_and_change, clips, clips) == pytest.approx(0, abs=1e-6)

    def level(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))[:, :2]

    assert frame_fid(level, reference.flip(1), reference) == pytest.approx(0, abs=1e-6)
    assert fvd(level_and_change, reference.flip(1), reference) > 100
    frames = [torch.stack([level(frame[None])[0] for clip in x for frame in clip]) for x in (clips, reference)]
    assert frame_fid(level, clips, reference) == pytest.approx(frechet_distance(*frames), rel=1e-6)


def test_batches_do_not_matter():
    whole, parts = Scores(), Scores()
    for scores, batches in ((whole, [[0, 1, 2]]), (parts, [[2], [0, 1]])):
        for rows in batches:
            scores.update(rows, motion=motion(CLIPS[rows]), dynamic=dynamic(searched, CLIPS[rows]))
    assert whole.figures() == parts.figures()


class Script(torch.nn.Module):
    """What the published TorchScript file is called with."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert rescale
        assert resize
        assert return_features
        return torch.stack([x[:, 0, 0, 0, 0], x[:, 1, 2, 3, 4], x.amax((1, 2, 3, 4))], 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the published file is TorchScript
def test_i3d_is_called_as_published(tmp_path):
    """Channels first, levels 0..255 as float, any batch."""
    torch.jit.script(Script()).save(str(tmp_path / "i3d.pt"))
    clips = noise_images(60, 8, 10).view(5, 12, 3, 8, 10)
    expected = [[x[0, 0, 0, 0], x[2, 1, 3, 4], x.max()] for x in clips.float()]
    torch.testing.assert_close(I3D(tmp_path / "i3d.pt", batch=2)(clips), torch.tensor(expected))
    with pytest.raises(ValueError, match="at least 10 frames; got 9"):
        I3D(tmp_path / "i3d.pt")(clips[:, :9])
    (tmp_path / "text.pt").write_text("<html>")
    for name, line in (
        ("none.pt", "i3d: no file .*none.pt; run: curl"),
        ("text.pt", "is no TorchScript file; run: curl"),
    ):
        with pytest.raises(ValueError, match=line):
            I3D(tmp_path / name)


def test_raft_is_that_of_torchvision(tmp_path):
    """With its own transform on sides that fit; other sides are padded by their edges and cut again."""
    from torchvision.models.optical_flow import raft_small
    from torchvision.transforms._presets import OpticalFlow

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = raft_small().eval()
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    raft = Raft(tmp_path / "raft.pth", "small", batch=1)
    frames = noise_images(3, 136, 128)
    with torch.no_grad():
        expected = network(*OpticalFlow()(frames[:2], frames[1:]))[-1]
        padded = torch.nn.functional.pad(frames[:, :, :130, :100].float(), (0, 28, 0, 6), mode="replicate")
        cut = network(*OpticalFlow()(padded[:1].to(torch.uint8), padded[1:2].to(torch.uint8)))[-1][:, :, :130, :100]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(raft(frames[:2], frames[1:]), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(raft(frames[:1, :, :130, :100], frames[1:2, :, :130, :100]), cut, rtol=1e-3, atol=1e-3)
    assert Raft(tmp_path / "raft.pth").name == "raft-small"
    with pytest.raises(
        ValueError, match=r"raft: no file .*none.pth; run: curl --create-dirs -Lo .* https://download.pytorch.org/"
    ):
        Raft(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"raft\.pth holds no raft_large of torchvision; run: curl"):
        Raft(tmp_path / "raft.pth", "large")


def test_bad_input_is_refused():
    for wrong in (CLIPS[0], CLIPS.float(), CLIPS[:, :1], CLIPS[:0], CLIPS[:, :, :2]):
        with pytest.raises(ValueError, match=r"clips must be \(N, F, 3, H, W\) uint8 with F at least 2; got"):
            motion(wrong)
    with pytest.raises(ValueError, match="got 5 and 4 frames"):
        fvd(level_and_change, CLIPS, CLIPS[:, :4])
    with pytest.raises(ValueError, match=r"features must be \(N, F, D\) with F at least 2"):
        consistency(torch.zeros(2, 1, 4))
