"""Inception features, and FID, KID and IS from files to figures, against torch-fidelity and torchmetrics."""

from __future__ import annotations

import hashlib
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.metrics.features import each, extract
from fewstep.metrics.frechet import Running, frechet_figure
from fewstep.metrics.images import batches
from fewstep.metrics.inception import URL, Inception, inception_score, split_scores
from fewstep.metrics.mmd import subset_mmds
from fewstep.metrics.statistics import of_images

pytestmark = pytest.mark.filterwarnings("ignore:Frechet distance of")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """PNG files: two sets of five blurred noises in different colours."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for shift, name in enumerate("ab"):
        (root / name).mkdir()
        for i in range(5):
            coarse = rng.integers(0, 256 - 40 * shift, (12, 10, 3), dtype=np.uint8)
            fine = Image.fromarray(coarse).resize((40, 48), Image.Resampling.BICUBIC)
            fine.save(root / name / f"{i:02}.png")
    return {name: root / name for name in "ab"}


@pytest.fixture(scope="module")
def inception(inception_weights) -> Inception:
    return Inception("64", inception_weights)


def stacked(folder: Path) -> torch.Tensor:
    return torch.cat(list(batches(folder)))


def fid(features: Inception, samples: Path, reference: Path) -> float:
    state = Running(features.name)
    for found in each(features, samples):
        state.update(found)
    return frechet_figure(state, of_images(features, reference))[0]


@pytest.fixture(scope="module")
def figure(folders, inception) -> float:
    return fid(inception, folders["a"], folders["b"])


def torchmetrics_fid(folders: dict[str, Path], weights: Path, **options: bool) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(64, feature_extractor_weights_path=str(weights), **options)
    metric.update(stacked(folders["b"]), real=True)
    metric.update(stacked(folders["a"]), real=False)
    return metric.compute().item()


def test_files_to_figures_as_torch_fidelity(folders, figure, inception, inception_weights):
    import torch_fidelity

    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders["a"]),
        input2=str(folders["b"]),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
        fid=True,
        kid=True,
        kid_subsets=7,
        kid_subset_size=4,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
    )
    assert theirs[torch_fidelity.KEY_METRIC_FID] > 0.1
    assert figure == pytest.approx(theirs[torch_fidelity.KEY_METRIC_FID], rel=1e-4)
    values = subset_mmds(*(extract(inception, folders[name], batch=2) for name in "ab"), subsets=7, size=4)
    assert values.mean().item() == pytest.approx(theirs[torch_fidelity.KEY_METRIC_KID_MEAN], rel=1e-4)
    assert values.std(correction=0).item() == pytest.approx(theirs[torch_fidelity.KEY_METRIC_KID_STD], rel=1e-4)


def test_files_to_figures_as_torchmetrics_with_either_resize(folders, figure, inception, inception_weights):
    """The default of torchmetrics is the other resize, and another figure."""
    assert figure == pytest.approx(torchmetrics_fid(folders, inception_weights, antialias=False), rel=1e-4)
    default = torchmetrics_fid(folders, inception_weights)
    smooth = Inception("64", inception_weights, resize="antialias")
    assert fid(smooth, folders["a"], folders["b"]) == pytest.approx(default, rel=1e-4)
    assert abs(default / figure - 1) > 1e-3
    assert inception.name.startswith("inception-64-tf1-")
    assert smooth.name.startswith("inception-64-antialias-")


def test_features_depend_on_their_own_image_alone(folders, inception):
    """Any batch, and float images as well as files."""
    whole = extract(inception, folders["a"])
    floats = stacked(folders["a"])[1:].float() / 255
    torch.testing.assert_close(extract(inception, floats, batch=3), whole[1:], rtol=1e-4, atol=1e-5)


def test_layers_are_torch_fidelitys(inception_weights):
    """Of a picture that is made smaller, where antialiasing would matter most."""
    from torch_fidelity import FeatureExtractorInceptionV3

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 310, 420), generator=generator, dtype=torch.uint8)
    layers = ["192", "2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("x", layers, str(inception_weights))(image)
    small, features = (Inception(layer, inception_weights) for layer in ("192", "2048"))
    for ours, expected in zip((small(image), features(image)), theirs, strict=False):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.logits(theirs[1]), theirs[2], rtol=1e-4, atol=1e-4)
    assert [found.shape[1] for found in theirs] == [192, 2048, 1008]


def test_inception_score_is_torch_fidelitys():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    logits = 2 * torch.randn(205, 20, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    scores = split_scores(logits)
    assert scores.mean().item() == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert scores.std(correction=0).item() == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-9)
    value, error = inception_score(logits)
    assert value == scores.mean().item()
    assert error == pytest.approx(theirs[KEY_METRIC_ISC_STD] / 3)  # sqrt(10 / 9) / sqrt(10)


def test_inception_score_counts_sure_classes():
    """Certain of 4 classes in equal parts: 4, whatever the other classes; certain of one: 1."""
    sure = 1000 * torch.nn.functional.one_hot(torch.arange(40) % 4, 10).float()
    assert inception_score(sure, splits=10, seed=None) == (pytest.approx(4), pytest.approx(0))
    assert inception_score(sure[:1].expand(40, 10), splits=4)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="10 splits needs logits"):
        inception_score(sure[:9])
    with pytest.raises(ValueError, match="finite"):
        inception_score(sure * float("nan"))


def test_range_and_type_are_checked(inception):
    with pytest.raises(ValueError, match=r"uint8 images in 0..255; got torch.float32"):
        inception(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\); got \(2, 8, 8, 3\)"):
        inception(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    with pytest.warns(UserWarning, match="no value above 1"):
        inception(torch.ones(1, 3, 8, 8, dtype=torch.uint8))


def test_features_that_are_not_finite_name_the_image(inception):
    class Broken:
        name = "broken"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            found = images.flatten(1).float()
            return torch.where(found.sum(1, keepdim=True) == 0, float("nan"), found)

    images = torch.full((9, 3, 2, 2), 5, dtype=torch.uint8)
    images[7] = 0
    with pytest.raises(ValueError, match="broken: features of image 7 are not finite"):
        extract(Broken(), images, batch=4)


def test_weights_that_cannot_be_had_say_what_would_supply_them(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError, match="network is unreachable") as raised:
        Inception()
    assert f"curl -L --create-dirs -o {path} {URL}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_in_the_hubs_folder_are_found_and_named_by_their_hash(tmp_path, monkeypatch, inception_weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / URL.rsplit("/", 1)[1]).symlink_to(inception_weights)
    digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert Inception("64").name == f"inception-64-tf1-{digest[:8]}"


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    torch.save({"Conv2d_1a_3x3": print}, tmp_path / "code.pth")
    for name, reason in {
        "none.pth": "no such file",
        "text.pth": "not a file of Inception weights",
        "code.pth": "not a file of Inception weights",
        "resnet.pth": "Missing key",
    }.items():
        with pytest.raises(ValueError, match=reason) as raised:
            Inception("64", tmp_path / name)
        assert str(raised.value).startswith(str(tmp_path / name))
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="known: 64, 192"):
        Inception("pool3")  # type: ignore[arg-type]
