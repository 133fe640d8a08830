"""Inception-v3 of 2015 as TensorFlow ran it, the feature space of FID, KID and IS, through torch-fidelity.

The reference resizes to 299 x 299 bilinearly by TensorFlow 1's rule, without antialiasing, from uint8 pixels. torchmetrics
antialiases by default, which gives other features and another FID. A name says which resize made the features.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.metrics.networks import in_batches

Layer = Literal["64", "192", "768", "2048", "logits", "logits_unbiased"]
Resize = Literal["tf1", "antialias"]

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"
"""First digits of the published file's hash; pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file."""

BATCH = 32
"""Images at once: the frames of some clips are thousands."""


class Inception:
    """Images (B, 3, H, W) uint8 to features (B, D) float32.

    Args:
        layer: of 64, 192, 768 or 2048 features (averaged over places), or the 1008 logits; IS takes `logits_unbiased`.
        weights: a file of them; None: the published ones, from torch's hub folder, or downloaded to it.
        device: where the network runs.
        resize: `tf1` for figures that compare with published ones, `antialias` with torchmetrics' default.

    Raises:
        ValueError: weights that cannot be had, with the command that supplies them, or that are of another network.
    """

    def __init__(
        self,
        layer: Layer = "2048",
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        resize: Resize = "tf1",
    ):
        if layer not in get_args(Layer):
            raise ValueError(f"Inception layer {layer!r}: unknown; known: {', '.join(get_args(Layer))}")
        if resize not in get_args(Resize):
            raise ValueError(f"Inception resize {resize!r}: unknown; known: {', '.join(get_args(Resize))}")
        path = _published() if weights is None else Path(weights)
        digest = _checked(path)
        self.device = torch.device(device)
        self.network = _network(layer, path, resize == "antialias").to(self.device)
        if self.device.type == "cpu":  # its convolutions are nearly twice as fast so, and differ by 1e-6
            self.network = self.network.to(memory_format=torch.channels_last)
        self.name = f"inception-{layer}-{resize}" + ("" if digest.startswith(SHA256) else f"-{digest[:8]}")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception takes uint8 images in 0..255; got {images.dtype}: use metrics.images.to_uint8")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception takes images (B, 3, H, W); got {tuple(images.shape)}")
        if images.max() <= 1:
            warnings.warn("Inception: no value above 1 in a batch of uint8 images, whose range is 0..255", stacklevel=2)

        def features(rows: Tensor) -> Tensor:
            found = self.network(rows.to(self.device))
            return found if isinstance(found, Tensor) else found[0]

        return in_batches(features, BATCH, images)

    def logits(self, features: Tensor) -> Tensor:
        """`logits_unbiased` (B, 1008) of features of layer 2048, so that FID and IS share one pass."""
        return features @ self.network.fc.weight.T.to(features.device)


def _network(layer: str, path: Path, antialias: bool) -> Any:
    from fewstep.samplers.compat import declare_torchvision_operators

    declare_torchvision_operators()  # torch-fidelity imports torchvision
    try:
        if antialias:
            from torchmetrics.image.fid import NoTrainInceptionV3

            return NoTrainInceptionV3("inception-v3-compat", [layer], str(path), antialias=True)
        from torch_fidelity import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3("inception-v3-compat", [layer], str(path))
    except RuntimeError as error:  # from load_state_dict, a line for each kind of difference
        reason = " ".join(str(error).split("\n", 2)[1:2]).strip()[:200] or str(error)
        raise ValueError(f"{path}: not the weights of Inception-v3 of 2015 ({reason}); they are at {URL}") from error


def _published() -> Path:
    """The published weights in torch's hub folder, downloaded if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:  # no network, no disk; another hash
            reason = getattr(error, "reason", error)
            raise ValueError(
                f"Inception weights cannot be downloaded ({reason}): give weights=FILE, or run "
                f"`curl -L --create-dirs -o {path} {URL}`"
            ) from error
    return path


def _checked(path: Path) -> str:
    """SHA-256 of a file that is there and holds tensors alone: torch-fidelity would run code that hides in it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of Inception weights; they are at {URL}") from None
    except Exception as error:  # unpickling fails in every way
        raise ValueError(f"{path}: not a file of Inception weights; they are at {URL}") from error
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_scores(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> Tensor:
    """Inception score of each split (arXiv:1606.03498), (splits,): exp of the mean KL(p(y | x) || p(y)).

    Args:
        logits: (N, classes), `logits_unbiased` for the published score.
        splits: each is scored against its own mean p(y).
        seed: of the shuffle before splitting, drawn as torch-fidelity draws it; None: in order.
    """
    n = len(logits)
    if logits.ndim != 2 or n < splits:
        raise ValueError(f"the Inception score of {splits} splits needs logits (N, classes) of as many images; got {n}")
    if not logits.isfinite().all():
        raise ValueError("the Inception score needs finite logits")
    if seed is not None:
        import numpy as np

        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
    log_p = logits.double().log_softmax(1)
    scores = []
    for part in (log_p[i * n // splits : (i + 1) * n // splits] for i in range(splits)):
        p = part.exp()
        # a class that no image has counts as 0, and not as 0 times infinity
        q = p.mean(0).clamp(min=torch.finfo(p.dtype).tiny)
        scores.append((p * (part - q.log())).sum(1).mean().exp())
    return torch.stack(scores)


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """Mean over splits and its standard error; 1 to the number of classes, higher is better.

    Papers print the standard deviation over splits instead, sqrt(splits) times as much (`split_scores`).
    """
    scores = split_scores(logits, splits, seed)
    return scores.mean().item(), (scores.std() / splits**0.5).item() if splits > 1 else float("nan")
