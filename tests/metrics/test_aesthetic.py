"""Aesthetic heads in the published formats; the packages of HPSv2 and ImageReward as they are called."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fewstep.metrics.aesthetic import aesthetic, hps, image_reward, load_head, load_hps
from tests.metrics.tiny_clip import noise_images

FEATURES = 30 * torch.randn(5, 768, generator=torch.Generator().manual_seed(0))


class Predictor(nn.Module):
    """The module of version 2's authors: its state dict is their file."""

    def __init__(self, size: int):
        super().__init__()
        sizes, drops = (1024, 128, 64, 16), (0.2, 0.2, 0.1, None)
        layers: list[nn.Module] = []
        for outputs, drop in zip(sizes, drops, strict=True):
            layers += [nn.Linear(size, outputs), *([nn.Dropout(drop)] if drop else [])]
            size = outputs
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))


@pytest.fixture(scope="module")
def heads() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"linear": nn.Linear(768, 1), "mlp": Predictor(768)}


def test_heads_read_unit_vectors(heads, tmp_path):
    """As the authors' scripts do: features over their length, through the module that wrote the file."""
    unit = FEATURES / FEATURES.norm(dim=-1, keepdim=True)
    for kind, module in heads.items():
        torch.save(module.state_dict(), tmp_path / f"{kind}.pth")
        plain = getattr(module, "layers", module).eval()
        found = aesthetic(FEATURES, load_head(tmp_path / f"{kind}.pth"))
        assert found.unique().numel() == 5
        torch.testing.assert_close(found, plain(unit)[:, 0].detach(), rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_named(heads, tmp_path):
    with_relu = {f"layers.{n}.weight": torch.zeros(1, 1) for n in (0, 3, 6, 9, 11)}
    torch.save(with_relu, tmp_path / "relu.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, line in (
        ("none.pth", r"no file .*none.pth; run: curl -LO https://github.com/.*linearMSE.pth, or .*linear.pth"),
        ("relu.pth", r"neither weight and bias nor layers.0, 2, 4, 6, 7; it holds layers.0.weight, layers.3.weight"),
        ("list.pth", "holds no state dict"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            load_head(tmp_path / name)
        assert str(caught.value).startswith("aesthetic: ")
    torch.save(heads["linear"].state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"reads 768 features, as of ViT-L-14 openai; got \(5, 512\)"):
        aesthetic(FEATURES[:, :512], load_head(tmp_path / "linear.pth"))


def brightness(picture) -> float:
    return sum(picture.getpixel((0, 0))) / 100


class Scorer(torch.nn.Module):
    """Features whose product is the brightness times the length of the prompt times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pictures, words):
        return {"image_features": self.weight * pictures, "text_features": words}


def test_every_image_is_scored_with_its_own_prompt(monkeypatch, tmp_path):
    """Packages that answer with a pixel of the picture and the length of the prompt; HPSv2's checkpoint is read once."""
    network, made = Scorer(), []
    torch.save({"state_dict": {"weight": torch.tensor(2.0)}}, tmp_path / "w.pt")
    package = {
        **{"device": "cpu", "model_dict": {}, "initialize_model": lambda: made.append(package["model_dict"])},
        "get_tokenizer": lambda name: lambda prompts: torch.tensor([[float(len(p))] for p in prompts]),
    }
    package["model_dict"] |= {"model": network, "preprocess_val": lambda x: torch.tensor([brightness(x)])}
    for name, content in (
        ("hpsv2", {}),
        ("hpsv2.img_score", package),
        ("ImageReward", {"load": lambda name: SimpleNamespace(score=lambda p, x: brightness(x) - len(p))}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    images, prompts = noise_images(4, 8, 8), ["a", "bcd", "a", "efghij"]
    corner, length = images[:, :, 0, 0].float().sum(1) / 100, torch.tensor([1.0, 3, 1, 6])
    scorer = load_hps(tmp_path / "w.pt")
    (tmp_path / "w.pt").unlink()
    for _ in range(2):
        torch.testing.assert_close(hps(images, prompts, scorer), 2 * corner * length)
    assert len(made) == 1
    torch.testing.assert_close(image_reward(images, prompts), corner - length)


def test_weights_that_the_packages_cannot_get_are_named(monkeypatch):
    """Packages that are there, on a machine without a network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("An error happened\nwhile trying to locate the file")

    for name, content in (
        ("hpsv2", {}),
        ("hpsv2.img_score", {"initialize_model": offline}),
        ("ImageReward", {"load": offline}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    images = noise_images(2, 8, 8)
    for score, line in (
        (hps, r"hps: the weights cannot be had \(An error happened while .*\); run: hf download xswu/HPSv2 "),
        (image_reward, r"image_reward: the weights cannot be had .*; run: hf download THUDM/ImageReward "),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            score(images, ["a", "b"])
        assert len(str(caught.value).splitlines()) == 1


def test_absent_packages_are_named(monkeypatch):
    for name in ("hpsv2", "hpsv2.img_score", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    images = noise_images(2, 8, 8)
    with pytest.raises(ValueError, match=r"hps: needs the package hpsv2 .*; run: pip install hpsv2"):
        hps(images, ["a", "b"])
    with pytest.raises(ValueError, match=r"needs the package image-reward .*; run: pip install image-reward"):
        image_reward(images, ["a", "b"])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        hps(images, ["a"])
