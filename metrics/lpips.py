"""LPIPS, the learned perceptual distance of two images (arXiv:1801.03924), as torchmetrics computes it.

torchmetrics ships the heads; the backbone is torchvision's, trained on ImageNet.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.metrics.networks import check_images, in_batches, read_weights
from fewstep.samplers.compat import declare_torchvision_operators

BACKBONES = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
SMALLEST = 32
"""Pixels of the shorter side; of less the deepest layers see nothing."""


class Lpips:
    """Distances of pairs of images, by a backbone with its trained heads.

    Args:
        net: "alex" (the paper's measure), "vgg" or "squeeze".
        weights: a file of torchvision's weights of that backbone (alexnet, vgg16, squeezenet1_1); None: torchvision's
            cache, or a download into it.
        device: where the network runs.
        batch: pairs in one call of the network.

    Raises:
        ValueError: an unknown backbone, or weights that are missing or another network's.
    """

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        batch: int = 16,
    ):
        if net not in BACKBONES:
            raise ValueError(f"lpips: backbone {net} is unknown; known: {', '.join(BACKBONES)}")
        declare_torchvision_operators()
        self.name, self.device, self.batch = f"lpips-{net}", device, batch
        self.network = _network(net, *_backbone(net, weights)).to(device)

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each image to the other of the same number, (N,) float32, at least 0.

        Args:
            images: (N, 3, H, W) uint8, at least 32 pixels a side.
            others: same shape.
        """
        check_images(images)
        if images.shape != others.shape or images.dtype != others.dtype:
            raise ValueError(f"lpips compares pairs of one shape; got {tuple(images.shape)} and {tuple(others.shape)}")
        if min(images.shape[-2:]) < SMALLEST:
            raise ValueError(f"lpips needs images of at least {SMALLEST} pixels a side; got {tuple(images.shape[-2:])}")
        return in_batches(self._distances, self.batch, images, others)

    def between(self, images: Tensor, others: Tensor) -> Tensor:
        """The same of float images in 0..1, where the network is, with their graph: to be minimised.

        Values out of range are taken as they are.
        """
        if min(images.shape[-2:]) < SMALLEST:
            raise ValueError(f"lpips needs images of at least {SMALLEST} pixels a side; got {tuple(images.shape[-2:])}")
        return self.network(2 * images - 1, 2 * others - 1).flatten()

    def _distances(self, images: Tensor, others: Tensor) -> Tensor:
        a, b = (x.to(self.device).float() / 127.5 - 1 for x in (images, others))
        return self.network(a, b).flatten()


def _backbone(net: str, weights: str | Path | None) -> tuple[dict[str, Tensor], str]:
    """State dict of the backbone, and where it came from."""
    import torchvision

    published = getattr(torchvision.models, BACKBONES[net]).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    command = f"run: curl --create-dirs -Lo {cached} {published.url}"
    if weights is not None:
        return read_weights(weights, "lpips", f"give torchvision's weights of {net}, or {command}"), str(weights)
    try:
        return published.get_state_dict(progress=False), str(cached)
    except OSError as error:  # what urllib raises without a network
        raise ValueError(f"lpips: the weights of {net} are not on this machine; {command}, or give a file") from error


def _network(net: Any, state: dict[str, Tensor], source: str) -> Any:
    """torchmetrics' network with the heads that it ships and this backbone.

    Its public class downloads the backbone in its constructor and takes no file. Made on the meta device: random
    classifiers of 100 million weights that are thrown away take longer than many a comparison.
    """
    import torchmetrics.functional.image.lpips as theirs

    with torch.device("meta"):
        network: Any = theirs._NoTrainLpips(pretrained=False, net=net, pnet_rand=True)
    network.scaling_layer = theirs.ScalingLayer()
    heads = torch.load(Path(theirs.__file__).parent / "lpips_models" / f"{net}.pth", "cpu", weights_only=True)
    network.load_state_dict(heads, strict=False, assign=True)
    # torchvision's `features.N` in slices that keep the numbers
    names = {name: re.sub(r"^slices?\.?\d+\.", "features.", name) for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: state[key] for name, key in names.items()}, assign=True)
    except (KeyError, RuntimeError) as error:
        kind = BACKBONES[net].removesuffix("_Weights")
        raise ValueError(f"lpips: {source} holds no {kind}; give torchvision's weights of it") from error
    return network.float().eval().requires_grad_(False)
