"""Fidelity to the teacher's image: closed forms, torchmetrics, and any split of the images."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fewstep.metrics.clip import Clip
from fewstep.metrics.fidelity import fidelity, ssim
from fewstep.metrics.lpips import Lpips
from fewstep.metrics.scores import Scores
from tests.metrics.tiny_clip import noise_images, save_tiny_clip

TARGET = noise_images(6, 40, 48, seed=3)


def noisy(std: float) -> torch.Tensor:
    noise = torch.randn(TARGET.shape, generator=torch.Generator().manual_seed(4))
    return (TARGET + std * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict:
    """LPIPS and CLIP with random weights."""
    import torchvision

    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "squeezenet.pth")
    clip = Clip(str(save_tiny_clip(folder / "clip")))
    return {"lpips": Lpips("squeeze", folder / "squeezenet.pth"), "clip_similarity": clip.similarity}


def test_psnr_and_ssim_are_those_of_torchmetrics():
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    images = noisy(25)
    found = fidelity(images, TARGET)
    assert list(found) == ["psnr", "ssim"]
    psnr = PeakSignalNoiseRatio(data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3))
    similarity = StructuralSimilarityIndexMeasure(data_range=255.0)
    for rows in (slice(0, 4), slice(4, 6)):
        psnr.update(images[rows].float(), TARGET[rows].float())
        similarity.update(images[rows].float(), TARGET[rows].float())
    assert found["psnr"].mean().item() == pytest.approx(psnr.compute().item(), abs=1e-4)
    assert found["ssim"].mean().item() == pytest.approx(similarity.compute().item(), abs=1e-5)


def test_ssim_of_flat_images():
    """No variance: (2 a b + c1) / (a^2 + b^2 + c1), c1 = 0.01^2 for values in 0..1; equal images 1."""
    a, b = torch.full((1, 3, 16, 16), 51, dtype=torch.uint8), torch.full((1, 3, 16, 16), 204, dtype=torch.uint8)
    assert ssim(a, b).item() == pytest.approx((2 * 0.2 * 0.8 + 1e-4) / (0.04 + 0.64 + 1e-4), abs=1e-4)
    assert ssim(TARGET, TARGET).tolist() == pytest.approx([1] * 6, abs=1e-5)


def test_every_figure_gets_worse_with_damage(networks):
    means = [
        {name: values.mean().item() for name, values in fidelity(noisy(std), TARGET, **networks).items()}
        for std in (0, 8, 30, 90)
    ]
    assert (means[0]["ssim"], means[0]["clip_similarity"]) == pytest.approx((1, 1), abs=1e-5)
    assert means[0]["lpips"] == 0
    assert means[0]["psnr"] == pytest.approx(20 * math.log10(255) + 10 * math.log10(3 * 40 * 48))
    for less, more in pairwise(means):
        assert less["lpips"] < more["lpips"]
        assert all(less[name] > more[name] for name in ("psnr", "ssim", "clip_similarity"))


def test_batches_and_processes_do_not_matter(networks):
    images = noisy(20)
    whole, one, two = Scores(), Scores(), Scores()
    whole.update(range(6), **fidelity(images, TARGET, **networks))
    for process, rows in ((one, [5]), (two, [1, 2, 3]), (one, [4, 0])):
        process.update(rows, **fidelity(images[rows], TARGET[rows], **networks))
    figures, expected = (one + two).figures(), whole.figures()
    assert list(expected) == ["psnr", "ssim", "lpips", "clip_similarity"]
    for name, (value, error) in expected.items():
        assert figures[name] == (pytest.approx(value, rel=1e-5), pytest.approx(error, rel=1e-3))
        assert error == pytest.approx(whole.column(name).std().item() / math.sqrt(6))


def test_a_clip_is_the_mean_of_its_frames(networks):
    images = noisy(20)
    frames, clips = (
        fidelity(images, TARGET, **networks),
        fidelity(images.view(2, 3, 3, 40, 48), TARGET.view(2, 3, 3, 40, 48), **networks),
    )
    for name, values in clips.items():
        torch.testing.assert_close(values, frames[name].view(2, 3).mean(1))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"got \(6, 3, 40, 48\) torch.uint8, \(5, 3, 40, 48\) torch.uint8"):
        fidelity(TARGET, TARGET[:5])
    with pytest.raises(ValueError, match="uint8 images of one shape"):
        fidelity(TARGET.float(), TARGET)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\) or \(N, F, 3, H, W\)"):
        fidelity(TARGET[0], TARGET[0])
