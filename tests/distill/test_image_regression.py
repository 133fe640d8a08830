"""The regression's distances of decoded images: LPIPS, and the judge in its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.distill.objectives import regression
from fewstep.distill.run import refuse
from fewstep.metrics.emoji import judge
from fewstep.metrics.emoji.judge import Perceptual
from fewstep.metrics.lpips import Lpips
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.runs import config
from tests.metrics.tiny_lpips import squeeze
from tests.pipelines import tiny_stable_diffusion


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_file(squeeze(), path)
    return path


def test_lpips_of_decoded_images(weights: Path):
    """The gradient is that of LPIPS through the decoder of all rows at once; none at the target; the value the figure's."""
    denoiser = denoiser_of(tiny_stable_diffusion())
    for p in denoiser.pipeline.vae.parameters():
        p.requires_grad_(True)
    settings: Any = config(Path(), method="dmd", lpips_net="squeeze", lpips_weights=str(weights))
    distance = regression.distance_of(settings, 0.0, denoiser)
    x0, x = (randn((2, 4, 24, 24), generators([s, s + 1])) for s in (0, 5))
    d, _ = regression.direction(x0, x, distance)
    leaf = x0.clone().requires_grad_()
    measure = Lpips("squeeze", weights)
    images, wanted = denoiser.to_images(leaf), denoiser.to_images(x).detach()
    (gradient,) = torch.autograd.grad(measure.between(images, wanted).sum(), leaf)
    whole = gradient * x0[0].numel()  # rounding, other in batches, turns a rectifier here and there
    assert torch.cosine_similarity(d.flatten(1), whole.flatten(1)).min() > 0.999
    assert (d.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1) - 1).abs().max() < 0.01
    assert all(p.grad is None for p in denoiser.pipeline.vae.parameters())
    same, zeros = regression.direction(x, x, distance)
    assert zeros.abs().max() < 1e-10
    assert same.abs().max() < 1e-4 * d.abs().max()
    squashed: Any = SimpleNamespace(pipeline=denoiser.pipeline, to_images=lambda z: denoiser.to_images(z).clamp(0, 1))
    inside = regression.in_images(squashed, measure)
    pictures = [(denoiser.to_images(z).clamp(0, 1) * 255).round().byte() for z in (x0, x)]
    assert inside(x0, x).item() == pytest.approx(measure(*pictures).mean().item(), rel=0.02)


def test_the_judge_in_place_of_lpips(tmp_path: Path):
    """Unit features of each layer, by hand; nothing at the target; other sizes are refused."""
    measure = Perceptual()
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    maps: list[list[torch.Tensor]] = [[], []]
    for kept, x in zip(maps, (2 * a - 1, 2 * b - 1), strict=True):
        for layer in judge.load().image.layers:
            x = layer(x)
            kept.append(x / x.norm(dim=1, keepdim=True))
    by_hand = torch.stack([(p - q).square().mean((2, 3)).sum(1) for p, q in zip(*maps, strict=True)]).mean(0)
    torch.testing.assert_close(measure.between(a, b), by_hand)
    assert measure.between(a, a).abs().max() == 0
    leaf = a.clone().requires_grad_()
    measure.between(leaf, b).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 0
    assert all(p.grad is None for p in measure.network.parameters())
    with pytest.raises(ValueError, match=r"emoji_judge compares images \(N, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        measure.between(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    stub: Any = SimpleNamespace(pipeline=SimpleNamespace(), to_images=lambda z: z)
    settings: Any = config(tmp_path, method="dmd", regression_metric="emoji_judge")
    distance = regression.distance_of(settings, 0.0, stub)
    d, values = regression.direction(a, b, distance, rows=2)
    torch.testing.assert_close(values.mean(), by_hand.mean())
    torch.testing.assert_close(d / a.numel(), leaf.grad / 2)


def test_frames_of_clips_are_images(weights: Path):
    """Mean over all frames of all clips."""
    clips = torch.rand(2, 2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    measure = Lpips("squeeze", weights)
    stub: Any = SimpleNamespace(pipeline=SimpleNamespace(), to_images=lambda z: clips[int(z)])
    found = regression.in_images(stub, measure)(torch.tensor(0), torch.tensor(1))
    each = [measure.between(clips[0, b, f][None], clips[1, b, f][None]) for b in range(2) for f in range(3)]
    torch.testing.assert_close(found, torch.cat(each).mean())


def test_missing_weights_are_refused_before_anything_loads(tmp_path: Path):
    """In one line, with the key; not where no image is compared."""
    asked = {
        "method": "dmd",
        "train_data": None,
        "prompts": "embedded:emoji",
        "lpips_weights": str(tmp_path / "none.pth"),
    }
    with pytest.raises(UserError, match=r"lpips: no file .*none.pth; .*\(here: lpips_weights=FILE\)") as caught:
        refuse(config(tmp_path, **asked))
    assert "\n" not in str(caught.value)
    refuse(config(tmp_path, **(asked | {"regression_metric": "squared"})))
    refuse(config(tmp_path, **(asked | {"regression_weight": 0.0})))


def test_small_images_are_refused(weights: Path):
    stub: Any = SimpleNamespace(pipeline=SimpleNamespace(), to_images=lambda z: z)
    distance, small = regression.in_images(stub, Lpips("squeeze", weights)), torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match=r"lpips needs images of at least 32 pixels a side; got \(16, 16\)"):
        distance(small, small)
