"""FID from files to figure, beside the libraries that the field uses, and what 50,000 images of 2048 features take.

    python benchmarks/fid.py [--images 64] [--side 64] [--layer 2048] [--weights FILE] [--device cpu] [--turns 2]
        [--peers FOLDER] [--scale 50000] [--out benchmarks/fid.md]

First table: the same files in one run, libraries in turns. Without weights the network is of the right architecture with
random ones, which takes as long; every library gets the same file. pytorch-fid and clean-fid are no requirements:
`pip install --no-deps --target FOLDER pytorch-fid clean-fid` and `--peers FOLDER`. They take their weights from the place
of a download, so that the file is put there. The table has the median of the seconds and of the processor seconds, of the
processes that read files too. ours, torch-fidelity and torchmetrics resize as the reference does and must agree: exit code
1 where they differ by more than 1e-3 of the greatest, or where ours takes 1.05 times the fastest's seconds or more. pytorch-fid resizes by torch's rule
and clean-fid by Pillow's bicubic one with antialiasing, so theirs are other figures; at `--side 299` nothing is resized.

Second table, where `--scale` is not 0: random features of 2048 dimensions, each line in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fewstep.samplers  # noqa: F401  before anything imports torchvision: see fewstep.samplers.compat
from fewstep.metrics.features import each
from fewstep.metrics.frechet import Moments, Running, frechet, frechet_figure, moments
from fewstep.metrics.images import batches
from fewstep.metrics.inception import Inception
from fewstep.metrics.manifolds import manifolds
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


def pytorch_fid(samples: Path, reference: Path, weights: Path, layer: str, device: str) -> float:
    """Files are read in this process: workers that start anew cost seconds on so few."""
    network: Any = importlib.import_module("pytorch_fid.inception")
    score = importlib.import_module("pytorch_fid.fid_score")
    network.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    folders = [str(samples), str(reference)]
    return float(score.calculate_fid_given_paths(folders, 50, device, int(layer), num_workers=0))


def clean_fid(samples: Path, reference: Path, weights: Path, layer: str, device: str) -> float:
    """Its own resize, and its PyTorch network, which is pytorch-fid's; layer 2048 alone."""
    network: Any = importlib.import_module("cleanfid.inception_pytorch")
    features = importlib.import_module("cleanfid.features")
    fid = importlib.import_module("cleanfid.fid")
    network.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    if layer != "2048":
        return math.nan
    model = features.feature_extractor("pytorch_inception", torch.device(device), use_dataparallel=False)
    options = {"num_workers": 0, "batch_size": 50, "device": torch.device(device), "verbose": False}
    return float(fid.compare_folders(str(samples), str(reference), model, "clean", **options))


Contender = Callable[[Path, Path, Path, str, str], float]
RESIZE = {"pytorch_fid": "torch, bilinear", "clean_fid": "Pillow, bicubic, antialiased"}
"""Of those that resize otherwise than the reference does."""


def compared(o: argparse.Namespace) -> tuple[list[str], bool]:
    """Lines of the first table, and whether figures agree and none is faster than ours."""
    contenders: list[Contender] = [ours, torch_fidelity, torchmetrics, pytorch_fid, clean_fid]
    wall: dict[str, list[float]] = {f.__name__: [] for f in contenders}
    processor: dict[str, list[float]] = {f.__name__: [] for f in contenders}
    value: dict[str, float] = {}
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        weights = o.weights or random_weights(root / "random.pth")
        samples, reference = (write_images(root / str(seed), o.images, o.side, seed) for seed in (1, 0))
        few = write_images(root / "few", 2, o.side, 0)
        for contender in contenders:
            try:
                contender(few, few, weights, "64", o.device)  # imports and the first call are slow
            except Exception as error:  # not installed, or not of this scipy or torch
                absent[contender.__name__] = f"{type(error).__name__}: {error}".splitlines()[0]
        for _ in range(o.turns):
            for contender in (f for f in contenders if f.__name__ not in absent):
                began = time.perf_counter(), sum(os.times()[:4])
                try:
                    value[contender.__name__] = contender(samples, reference, weights, o.layer, o.device)
                except Exception as error:
                    absent[contender.__name__] = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                wall[contender.__name__].append(time.perf_counter() - began[0])
                processor[contender.__name__].append(sum(os.times()[:4]) - began[1])
    lines = ["| library | resize | FID | seconds | processor seconds |", "|---|---|---|---|---|"]
    seconds = {n: statistics.median(w) for n, w in wall.items() if w and n not in absent}
    for name, took in seconds.items():
        how = RESIZE.get(name, "TensorFlow 1, bilinear")
        spent = statistics.median(processor[name])
        lines.append(f"| {name} | {how} | {value[name]:.6g} | {took:.2f} | {spent:.2f} |")
    lines += [f"| {name} | {RESIZE.get(name, '')} | {why} | - | - |" for name, why in absent.items()]
    alike = [value[n] for n in seconds if n not in RESIZE]
    agree = max(alike) - min(alike) <= 1e-3 * max(alike)
    return lines, agree and seconds["ours"] <= 1.05 * min(seconds.values())


D = 2048
MEASURES = ("moments", "distance", "figure", "manifolds")


def measured(what: str, n: int) -> str:
    """A line of the second table, of this process."""
    torch.manual_seed(0)
    # correlated as features are: every dimension is a mixture of 256 factors and of noise of its own
    mixing = torch.randn(256, D) / 16

    def rows(k: int) -> torch.Tensor:
        return torch.randn(k, 256) @ mixing + 0.1 * torch.randn(k, D)

    said = {
        "moments": f"moments of {n} x {D}, batches of 64, one group",
        "distance": f"one Frechet distance in {D} dimensions",
        "figure": f"Frechet figure of {n} x {D} with its error: 10 groups, 11 distances",
        "manifolds": f"precision, recall, density, coverage of {n} and {n} x {D}",
    }[what]
    state = Running("random", groups=10 if what == "figure" else 1)

    def seen() -> Moments:
        for start in range(0, n, 64):
            state.update(rows(min(64, n - start)))
        return state.moments()

    work: Callable[[], object] = seen
    if what == "manifolds":
        work = partial(manifolds, rows(n), rows(n))
    elif what == "distance":
        work = partial(frechet, seen(), moments(rows(4 * D)))
    elif what == "figure":
        seen()
        work = partial(frechet_figure, state, moments(rows(4 * D)))
    before, began = peak(), time.perf_counter()
    work()
    took = time.perf_counter() - began
    return f"| {said} | {took:.1f} | {before:.2f} | {peak():.2f} |"


def peak() -> float:
    """GB that this process took at most; of its own, where ru_maxrss has that of the process that started it too."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def scaled(o: argparse.Namespace) -> list[str]:
    """Lines of the second table."""
    lines = ["| what | seconds | GB at most before | GB at most |", "|---|---|---|---|"]
    for what in MEASURES:
        command = [sys.executable, __file__, "--measure", what, "--scale", str(o.scale)]
        lines.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="of each of the two sets")
    parser.add_argument("--side", type=int, default=64, help="of an image, pixels")
    parser.add_argument("--layer", choices=["64", "192", "768", "2048"], default="2048")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="folder of pytorch-fid and clean-fid")
    parser.add_argument("--scale", type=int, default=50_000, help="features of the second table; 0: without it")
    parser.add_argument("--out", type=Path, help="a Markdown file of the tables")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    if o.measure:
        print(measured(o.measure, o.scale))
        return 0
    if o.peers:
        sys.path.append(str(o.peers))
    lines, good = compared(o)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {o.device}"
    said = f"{o.images} and {o.images} PNG files of {o.side} x {o.side}, layer {o.layer}, {o.turns} turns; {machine}."
    text = "\n".join(["# FID from files to figure", "", "`python benchmarks/fid.py`: " + said, "", *lines])
    print(text, flush=True)
    if o.scale:
        more = "\n".join(["", "What many features take, each line in a process of its own:", "", *scaled(o)])
        print(more)
        text += "\n" + more
    if o.out:
        o.out.write_text(text + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
