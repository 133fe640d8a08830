"""Figures of clips (N, F, 3, H, W): FVD, FID of frames, temporal consistency, motion, dynamic degree.

One value for each clip, for `Scores`, but for the two Frechet distances. A student of few steps loses motion first, and
a still clip is perfectly consistent: read consistency beside motion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.networks import cosine, in_batches, read_weights
from fewstep.samplers.compat import declare_torchvision_operators

Network = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W), or clips (B, F, 3, H, W), uint8, to features (B, D) float32."""
Flow = Callable[[Tensor, Tensor], Tensor]
"""Frames (B, 3, H, W) uint8 and the next ones to displacements (B, 2, H, W), x and y in pixels."""

I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"


def check_clips(clips: Tensor) -> None:
    """Refuse what is not (N, F, 3, H, W) uint8 with two frames at least, with ValueError."""
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.dtype != torch.uint8 or not len(clips) or clips.shape[1] < 2:
        got = f"{tuple(clips.shape)} {clips.dtype}"
        raise ValueError(f"clips must be (N, F, 3, H, W) uint8 with F at least 2; got {got}")


def fvd(network: Network, clips: Tensor, reference: Tensor) -> float:
    """Frechet video distance (arXiv:1812.01717) in the features of a network of clips, e.g. `I3D`.

    Sets that do not fit into memory: `moments` and `merge` of `frechet.py` on the features of their parts.

    Args:
        network: clips to features.
        clips: (N, F, 3, H, W) uint8.
        reference: (M, F, 3, H, W) uint8.
    """
    for x in (clips, reference):
        check_clips(x)
    if clips.shape[1] != reference.shape[1]:
        raise ValueError(f"fvd compares clips of one length; got {clips.shape[1]} and {reference.shape[1]} frames")
    return frechet_distance(network(clips), network(reference))


def frame_fid(network: Network, clips: Tensor, reference: Tensor) -> float:
    """Frechet distance between all frames of clips and all of the reference, in the features of a network of images."""
    return frechet_distance(*(frame_features(network, x).flatten(0, 1) for x in (clips, reference)))


def frame_features(network: Network, clips: Tensor) -> Tensor:
    """Features (N, F, D) of every frame of clips, by a network of images such as `Clip` or `Dino`."""
    check_clips(clips)
    return network(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


def consistency(features: Tensor) -> Tensor:
    """Mean cosine of consecutive frames' features (N, F, D), of each clip, (N,) in -1..1; 1 for a still clip."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features must be (N, F, D) with F at least 2; got {tuple(features.shape)}")
    return cosine(features[:, :-1], features[:, 1:]).mean(1)


def motion(clips: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames, grey levels 0..255, of each clip, (N,) float64; 0 when still."""
    check_clips(clips)
    total = torch.stack([(b.short() - a.short()).abs().sum((1, 2, 3)) for a, b in _steps(clips)], 1).sum(1)
    return total.double() / clips[0, 1:].numel()


def flow_motion(flow: Flow, clips: Tensor) -> Tensor:
    """Mean length of the displacement from frame to frame, pixels, of each clip, (N,) float64."""
    check_clips(clips)
    return torch.stack([flow(a, b).double().norm(dim=1).mean((1, 2)) for a, b in _steps(clips)], 1).mean(1)


def dynamic(flow: Flow, clips: Tensor, fps: float = 8) -> Tensor:
    """1 for each clip that moves and 0 for the others, (N,); their mean is the dynamic degree (VBench, arXiv:2311.17982).

    A step moves if the fastest 5% of its pixels go farther on average than 6 pixels at a shorter side of 256, more
    where fps is below 8; a clip moves if a quarter as many steps do as it has frames. Clips are taken at about 8 fps:
    of faster ones at every second frame, every third, ...
    """
    check_clips(clips)
    clips = clips[:, :: max(1, round(fps / 8))]
    if clips.shape[1] < 2:
        raise ValueError(f"dynamic degree: clips at {fps:g} fps last less than two frames at 8 fps")
    frames, height, width = clips.shape[1], *clips.shape[-2:]
    threshold = max(1.0, 8 / fps) * 6 * min(height, width) / 256
    fastest = max(1, int(height * width * 0.05))
    speeds = [flow(a, b).double().norm(dim=1).flatten(1).topk(fastest).values.mean(1) for a, b in _steps(clips)]
    moving = (torch.stack(speeds, 1) > threshold).sum(1)
    return (moving >= max(1, round(frames / 4))).double()


class OfLength:
    """A network of clips for those of one length, whose name tells it: features of others do not compare."""

    def __init__(self, network: Any, frames: int):
        self.network, self.frames = network, frames
        self.name = f"{network.name}-{frames}-frames"

    def __call__(self, clips: Tensor) -> Tensor:
        """Features of clips (N, F, 3, H, W) uint8; ValueError for another F."""
        check_clips(clips)
        if clips.shape[1] != self.frames:
            raise ValueError(f"fvd compares clips of one length; got {self.frames} and {clips.shape[1]} frames")
        return self.network(clips)


class I3D:
    """The I3D network that FVD is published with, from its TorchScript file (StyleGAN-V's port), for `fvd`.

    Args:
        path: i3d_torchscript.pt.
        device: where it runs.
        batch: clips in one call.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", batch: int = 4):
        self.device, self.batch = device, batch
        otherwise = f"run: curl -Lo {path} '{I3D_URL}'"
        if not Path(path).is_file():
            raise ValueError(f"i3d: no file {path}; {otherwise}")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"i3d: {path} is no TorchScript file; {otherwise}") from error
        with Path(path).open("rb") as file:
            self.name = f"i3d-{hashlib.file_digest(file, 'sha256').hexdigest()[:8]}"

    def __call__(self, clips: Tensor) -> Tensor:
        """Features (N, 400) float32 of clips (N, F, 3, H, W) uint8, resized by the network itself; F at least 10."""
        check_clips(clips)
        if clips.shape[1] < 10:
            raise ValueError(f"i3d: needs clips of at least 10 frames; got {clips.shape[1]}")
        return in_batches(self._features, self.batch, clips)

    def _features(self, clips: Tensor) -> Tensor:
        channels_first = clips.to(self.device).float().transpose(1, 2)
        return self.network(channels_first, rescale=True, resize=True, return_features=True)


FIRST = "feature_encoder.convnormrelu.0.weight"
"""Of torchvision's RAFT the first convolution: 32 channels in the small one, 64 in the large one."""


class Raft:
    """Optical flow by torchvision's RAFT (arXiv:2003.12039), from a file of its weights.

    Args:
        path: torchvision's weights; None: the large ones of its cache, or a download into it.
        size: raft_large or raft_small; None: whichever the file is of.
        device: where it runs.
        batch: pairs of frames in one call.
    """

    def __init__(
        self,
        path: str | Path | None,
        size: Literal["large", "small"] | None = None,
        device: str | torch.device = "cpu",
        batch: int = 4,
    ):
        declare_torchvision_operators()
        from torchvision.models import optical_flow

        published: Any = getattr(optical_flow, f"Raft_{(size or 'large').capitalize()}_Weights").DEFAULT
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
        otherwise = f"run: curl --create-dirs -Lo {path or cached} {published.url}"
        if path is None:
            try:
                state = published.get_state_dict(progress=False)
            except OSError as error:  # what urllib raises without a network
                raise ValueError(f"raft: the weights are not on this machine; {otherwise}, or give a file") from error
        else:
            state = read_weights(path, "raft", otherwise)
        size = size or ("small" if len(state.get(FIRST, ())) == 32 else "large")
        self.name, self.device, self.batch = f"raft-{size}", device, batch
        self.network = getattr(optical_flow, f"raft_{size}")().eval().requires_grad_(False)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"raft: {path} holds no raft_{size} of torchvision; {otherwise}") from error
        self.network.to(device)

    def __call__(self, frames: Tensor, following: Tensor) -> Tensor:
        """Displacements (N, 2, H, W) float32, x and y in pixels, from frames (N, 3, H, W) uint8 to the following ones."""
        return in_batches(self._flow, self.batch, frames, following)

    def _flow(self, frames: Tensor, following: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        # sides that are multiples of 8, and of 128 at least, below which the coarsest correlations vanish
        bottom, right = (max(128, -(-side // 8) * 8) - side for side in (height, width))
        a, b = (
            F.pad(x.to(self.device).float() / 127.5 - 1, (0, right, 0, bottom), mode="replicate")
            for x in (frames, following)
        )
        return self.network(a, b)[-1][..., :height, :width]


def _steps(clips: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Frames of all clips and the next ones, step by step."""
    return [(clips[:, i], clips[:, i + 1]) for i in range(clips.shape[1] - 1)]
