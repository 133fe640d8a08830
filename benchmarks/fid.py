"""FID from files to figure: fewstep against torch-fidelity and torchmetrics, on the same files in one run.

    python benchmarks/fid.py [--images 64] [--side 64] [--layer 2048] [--weights FILE] [--device cpu] [--turns 2]

Without weights the network is of the right architecture with random ones, which takes as long. The libraries run in
turns; the table has the median of the seconds and of the processor seconds of this process, which torch-fidelity's
readers are not part of. Exit code 1 where figures differ by more than 1e-3 of the greatest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fewstep.samplers  # noqa: F401  before anything imports torchvision: see fewstep.samplers.compat
from fewstep.metrics.features import each
from fewstep.metrics.frechet import Running, frechet
from fewstep.metrics.images import batches
from fewstep.metrics.inception import Inception
from fewstep.metrics.statistics import of_images


def random_weights(path: Path) -> Path:
    """He's initialisation, so that features do not vanish over 40 layers."""
    from torch_fidelity import FeatureExtractorInceptionV3

    class Unread(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **options):
            pass

    torch.manual_seed(0)
    torch.save({}, path)
    network = Unread("unread", ["2048"], str(path))
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
    torch.save(network.state_dict(), path)
    return path


def write_images(folder: Path, n: int, side: int, seed: int) -> Path:
    """Blurred noise, the second set darker than the first."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        coarse = rng.integers(0, 255 - 60 * seed, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05}.png")
    return folder


def ours(samples: Path, reference: Path, weights: Path, layer: str, device: str) -> float:
    features = Inception(layer, weights, device)  # type: ignore[arg-type]
    state = Running(features.name, groups=1)
    for found in each(features, samples):
        state.update(found)
    return frechet(state.moments(), of_images(features, reference))


def torch_fidelity(samples: Path, reference: Path, weights: Path, layer: str, device: str) -> float:
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=str(samples),
        input2=str(reference),
        cuda=device != "cpu",
        cache=False,
        verbose=False,
        fid=True,
        feature_layer_fid=layer,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
    )
    return found[torch_fidelity.KEY_METRIC_FID]


def torchmetrics(samples: Path, reference: Path, weights: Path, layer: str, device: str) -> float:
    """With `antialias=False`, and files read as ours are: it reads none."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(int(layer), feature_extractor_weights_path=str(weights), antialias=False)
    metric.to(device)
    for folder, real in ((reference, True), (samples, False)):
        for images in batches(folder):
            metric.update(images.to(device), real=real)
    return metric.compute().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="of each of the two sets")
    parser.add_argument("--side", type=int, default=64, help="of an image, pixels")
    parser.add_argument("--layer", choices=["64", "192", "768", "2048"], default="2048")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=2)
    o = parser.parse_args()
    warnings.simplefilter("ignore")

    contenders: list[Callable[[Path, Path, Path, str, str], float]] = [ours, torch_fidelity, torchmetrics]
    wall: dict[str, list[float]] = {f.__name__: [] for f in contenders}
    processor: dict[str, list[float]] = {f.__name__: [] for f in contenders}
    value: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        weights = o.weights or random_weights(root / "random.pth")
        samples, reference = (write_images(root / str(seed), o.images, o.side, seed) for seed in (1, 0))
        few = write_images(root / "few", 2, o.side, 0)
        for contender in contenders:
            contender(few, few, weights, "64", o.device)  # imports and the first call are slow
        for _ in range(o.turns):
            for contender in contenders:
                began = time.perf_counter(), time.process_time()
                value[contender.__name__] = contender(samples, reference, weights, o.layer, o.device)
                wall[contender.__name__].append(time.perf_counter() - began[0])
                processor[contender.__name__].append(time.process_time() - began[1])
    print("| library | FID | seconds | processor seconds |\n|---|---|---|---|")
    for name in wall:
        seconds, spent = statistics.median(wall[name]), statistics.median(processor[name])
        print(f"| {name} | {value[name]:.5g} | {seconds:.2f} | {spent:.2f} |")
    most = max(value.values())
    return int(most - min(value.values()) > 1e-3 * most)


if __name__ == "__main__":
    sys.exit(main())
