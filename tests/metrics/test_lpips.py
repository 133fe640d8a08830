"""LPIPS beside its formula and torchmetrics, with random backbones from a file."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from fewstep.metrics.lpips import Lpips
from tests.metrics.tiny_clip import noise_images
from tests.metrics.tiny_lpips import backbone, state

A, B = noise_images(3, 40, 48, seed=1), noise_images(3, 40, 48, seed=2)
LAYERS = {
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
"""torchvision's name, and the modules whose outputs are compared: the rectifiers before each pooling, or fire modules."""


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, tuple[torch.nn.Sequential, Path]]:
    """Of each net the layers with random weights, and their file."""
    folder, made = tmp_path_factory.mktemp("lpips"), {}
    for net, (name, _) in LAYERS.items():
        layers = backbone(name)
        made[net] = layers, folder / f"{net}.safetensors"
        save_file(state(layers), made[net][1])
    return made


@pytest.mark.parametrize("net", LAYERS)
def test_the_formula(backbones, net):
    """Sum over layers of the mean over places of w (u - v)^2, u and v of unit length over channels."""
    import torchmetrics.functional.image.lpips as theirs

    layers, file = backbones[net]
    heads = torch.load(
        Path(theirs.__file__).parent / "lpips_models" / f"{net}.pth", map_location="cpu", weights_only=True
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((i.float() / 127.5 - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for i in (A, B))
    expected = torch.zeros(3)
    with torch.no_grad():
        for number, layer in enumerate(layers[: LAYERS[net][1][-1] + 1]):
            x, y = layer(x), layer(y)
            if number in LAYERS[net][1]:
                weight = heads[f"lin{LAYERS[net][1].index(number)}.model.1.weight"]
                gap = (torch.nn.functional.normalize(x) - torch.nn.functional.normalize(y)).square()
                expected += (weight * gap).sum(1).mean((1, 2))
    assert expected.min() > 1e-3
    torch.testing.assert_close(Lpips(net, file)(A, B), expected, rtol=1e-3, atol=1e-6)


def test_the_figure_of_torchmetrics(monkeypatch):
    """Its public metric, which asks torchvision for the weights, and ours with None, which does too."""
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = LearnedPerceptualImagePatchSimilarity("squeeze", normalize=True)
    theirs.update(A / 255, B / 255)
    assert Lpips("squeeze")(A, B).mean().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_as_a_loss(backbones):
    """Of float images the same values; with a gradient that a step against it goes down by."""
    lpips = Lpips("squeeze", backbones["squeeze"][1])
    images, others = (x.float() / 255 for x in (A, B))
    images.requires_grad_(True)
    values = lpips.between(images, others)
    torch.testing.assert_close(values.detach(), lpips(A, B), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    step = 0.01 * values.sum().detach() / gradient.square().sum()  # to first order 1% of the distance
    gained = values.sum() - lpips.between(images - step * gradient, others).sum()
    assert gained.item() == pytest.approx(0.01 * values.sum().item(), rel=0.1)


def test_batches_order_and_sides_do_not_matter(backbones):
    file = backbones["squeeze"][1]
    values = Lpips("squeeze", file)(A, B)
    assert values.unique().numel() == 3
    torch.testing.assert_close(Lpips("squeeze", file, batch=2)(B.flip(0), A.flip(0)).flip(0), values)
    assert torch.equal(Lpips("squeeze", file)(A, A), torch.zeros(3))


def test_what_is_missing_is_named_with_what_supplies_it(backbones, tmp_path, monkeypatch):
    import torchvision

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/cache")
    text, cut = tmp_path / "text.pth", tmp_path / "cut.safetensors"
    text.write_text("<html>404</html>")
    cut.write_bytes(b"404")
    url = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    command = f"run: curl --create-dirs -Lo /cache/checkpoints/alexnet-owt-7be5be79.pth {url}"
    for net, weights, line in (
        ("alex", None, f"the weights of alex are not on this machine; {command}, or give a file"),
        ("alex", tmp_path / "none.pth", f"no file .*none.pth; give torchvision's weights of alex, or {command}"),
        ("alex", cut, "cut.safetensors is not a file of weights; give torchvision's weights of alex"),
        ("alex", text, "text.pth is not a file of weights; give torchvision's weights of alex"),
        ("alex", backbones["squeeze"][1], "squeeze.safetensors holds no AlexNet"),
        ("resnet", None, "backbone resnet is unknown; known: alex, vgg, squeeze"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            Lpips(net, weights)
        assert str(caught.value).startswith("lpips: ")
        assert len(str(caught.value).splitlines()) == 1


def test_bad_input_is_refused(backbones):
    lpips = Lpips("squeeze", backbones["squeeze"][1])
    with pytest.raises(ValueError, match=r"pairs of one shape; got \(3, 3, 40, 48\) and \(2, 3, 40, 48\)"):
        lpips(A, B[:2])
    with pytest.raises(ValueError, match="at least 32 pixels a side"):
        lpips(A[..., :31], B[..., :31])
