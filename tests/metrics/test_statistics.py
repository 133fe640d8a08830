"""Files of reference statistics: ours and those that others publish; the hash of a set of images."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.metrics.frechet import frechet, moments
from fewstep.metrics.statistics import Statistics, cached, content_hash, load, of_images, save

IMAGES = torch.randint(0, 256, (12, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Corners:
    """Six pixels of a picture."""

    name = "corners/6"
    calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images[:, :, ::3, 0].flatten(1).float()


def folder_of(images: torch.Tensor, folder, suffix: str = "png"):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.{suffix}")
    return folder


@pytest.fixture
def statistics() -> Statistics:
    return of_images(Corners(), IMAGES)


def test_tensor_and_folder_have_the_same_statistics(tmp_path, statistics):
    found = of_images(Corners(), folder_of(IMAGES, tmp_path / "a"), batch=5)
    torch.testing.assert_close(found.mean, statistics.mean)
    torch.testing.assert_close(found.covariance, IMAGES[:, :, ::3, 0].flatten(1).double().T.cov())
    assert (found.n, found.features) == (12, "corners/6")


def test_what_is_saved_is_what_is_read_here_and_elsewhere(tmp_path, statistics):
    save(statistics, tmp_path / "deep" / "a.npz")
    found = load(tmp_path / "deep" / "a.npz")
    assert torch.equal(found.mean, statistics.mean)
    assert torch.equal(found.covariance, statistics.covariance)
    assert found[2:] == statistics[2:]
    assert os.listdir(tmp_path / "deep") == ["a.npz"]
    with np.load(tmp_path / "deep" / "a.npz") as file:  # as pytorch-fid and ADM do: no pickles
        np.testing.assert_array_equal(file["mu"], statistics.mean.numpy())
        np.testing.assert_array_equal(file["sigma"], statistics.covariance.numpy())


def test_published_files_are_read(tmp_path, statistics):
    """pytorch-fid's: mu and sigma. ADM's: the images and spatial moments beside them, and single precision."""
    mu, sigma = statistics.mean.numpy(), statistics.covariance.numpy()
    np.savez_compressed(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    single = mu.astype(np.float32), sigma.astype(np.float32)
    np.savez(
        tmp_path / "adm.npz", arr_0=IMAGES.numpy(), mu=single[0], sigma=single[1], mu_s=np.zeros(3), sigma_s=np.eye(3)
    )
    other = moments(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    expected = frechet(other, statistics)
    for name, precision in (("fid", 1e-12), ("adm", 1e-6)):
        found = load(tmp_path / f"{name}.npz")
        assert frechet(other, found) == pytest.approx(expected, rel=precision)
        assert found[2:] == (0, "", "")


def broken(path, **arrays) -> None:
    np.savez(path, **({"mu": np.zeros(3), "sigma": np.eye(3)} | arrays))


WRONG = {
    "none.npz": (lambda path: None, "no such file"),
    "text.npz": (lambda path: path.write_text("mu sigma"), "not an .npz file"),
    "empty.npz": (lambda path: path.write_bytes(b""), "not reference statistics"),
    "one.npy": (lambda path: np.save(path, np.eye(3)), "one array"),
    "images.npz": (lambda path: np.savez(path, arr_0=np.zeros((5, 4, 4, 3))), "holds arr_0"),
    "half.npz": (lambda path: np.savez(path, mu=np.zeros(3)), "holds mu"),
    "shape.npz": (lambda path: broken(path, sigma=np.eye(4)), r"mu \(3,\) and sigma \(4, 4\)"),
    "nan.npz": (lambda path: broken(path, mu=np.full(3, np.nan)), "finite"),
    "skew.npz": (lambda path: broken(path, sigma=np.eye(3) + np.eye(3, k=1)), "symmetric"),
    "negative.npz": (lambda path: broken(path, sigma=-np.eye(3)), "not negative"),
    "single.npz": (lambda path: broken(path, n=1), "of 1 images"),
    "words.npz": (lambda path: broken(path, mu=np.array(["a", "b", "c"])), "not reference statistics"),
    "pickle.npz": (lambda path: broken(path, mu=np.array([{}, {}, {}])), "not an .npz file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_statistics_are_refused_in_one_line(tmp_path, name):
    make, reason = WRONG[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as raised:
        load(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(raised.value)


def test_torn_files_are_refused(tmp_path, statistics):
    save(statistics, tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not reference statistics"):
        load(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("mu.npy", b"short")
        file.writestr("sigma.npy", b"short")
    with pytest.raises(ValueError, match="not reference statistics"):
        load(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"are \.npz files"):
        save(statistics, tmp_path / "a.pt")


def test_hash_is_of_bytes_and_order(tmp_path):
    a = content_hash(folder_of(IMAGES, tmp_path / "a"))
    assert a == content_hash(folder_of(IMAGES, tmp_path / "b"))
    os.utime(tmp_path / "b" / "00.png", (0, 0))
    (tmp_path / "b" / "captions.txt").write_text("a picture")
    (tmp_path / "b" / "11.png").rename(tmp_path / "b" / "99.png")
    assert a == content_hash(tmp_path / "b")
    (tmp_path / "b" / "00.png").rename(tmp_path / "b" / "last.png")
    assert a != content_hash(tmp_path / "b")
    changed = IMAGES.clone()
    changed[5, 0, 0, 0] += 1
    assert a != content_hash(folder_of(changed, tmp_path / "c"))
    assert content_hash(IMAGES) == content_hash(IMAGES.float() / 255) != content_hash(changed)


def test_statistics_are_made_once_for_one_set_and_network(tmp_path):
    features = Corners()
    source = folder_of(IMAGES, tmp_path / "a")
    first = cached(features, source, tmp_path / "cache")
    made = features.calls
    assert torch.equal(cached(features, source, tmp_path / "cache").covariance, first.covariance)
    assert features.calls == made
    assert first.content == content_hash(source)
    other = Corners()
    other.name = "other/6"
    cached(other, source, tmp_path / "cache")
    assert other.calls
    (source / "00.png").unlink()
    assert cached(features, source, tmp_path / "cache").n == 11


def test_where_nothing_can_be_kept_they_are_made_all_the_same(tmp_path, statistics):
    """A home that is no folder, as of a service's user."""
    (tmp_path / "home").write_text("")
    with pytest.warns(UserWarning, match=r"home/cache/corners.*npz: cannot be kept \(Not a directory\)"):
        found = cached(Corners(), IMAGES, tmp_path / "home" / "cache")
    assert torch.equal(found.covariance, statistics.covariance)


def test_one_image_makes_no_statistics(tmp_path):
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        of_images(Corners(), IMAGES[:1])
