"""Closed forms of the figures that need no judge."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.metrics.pixels import image_psnr, mean_distance, psnr


def test_psnr_of_a_constant_error():
    """One grey level off everywhere: 20 log10(255); four off in half of the values: mean square 8."""
    target = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    images = target.clone()
    images[0] += 1
    images[1, :, :2] -= 4
    first, second = 20 * math.log10(255), 10 * math.log10(255**2 / 8)
    value, error = psnr(images, target)
    assert value == pytest.approx((first + second) / 2)
    assert error == pytest.approx(abs(first - second) / 2)  # standard deviation of two over the root of 2


def test_psnr_of_equal_images_is_finite():
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    assert psnr(images, images) == (pytest.approx(20 * math.log10(255) + 10 * math.log10(48)), 0)


def test_mean_distance_is_over_pairs_of_a_group():
    """Constant images of levels 0, 3, 9 and, in another group, 100, 104: (3 + 6 + 9) / 3 and 4."""
    levels = torch.tensor([0, 100, 3, 104, 9, 77], dtype=torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    value, error = mean_distance(images, [0, 1, 0, 1, 0, 2])  # the third group has one image
    assert value == pytest.approx(5)
    assert error == pytest.approx(1)  # of the means 6 and 4


def test_mean_distance_of_one_group_has_the_jackknife_error():
    """Without 0, 3, 9 in turn the mean of the rest is 6, 9, 3: sqrt(2/3 (0 + 9 + 9))."""
    images = torch.tensor([0, 3, 9], dtype=torch.uint8).view(-1, 1, 1, 1)
    value, error = mean_distance(images, [0, 0, 0])
    assert (value, error) == (pytest.approx(6), pytest.approx(math.sqrt(12)))


def test_memory_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch):
    """Clips are looked at some frames at a time: the same numbers, whatever the parts."""
    images, target = (torch.randint(0, 256, (3, 5, 3, 8, 8), dtype=torch.uint8) for _ in range(2))
    whole = image_psnr(images, target)
    split = torch.Tensor.split
    parts: list[int] = []
    monkeypatch.setattr(torch.Tensor, "split", lambda self, n: parts.append(n) or split(self, 100))
    torch.testing.assert_close(image_psnr(images, target), whole, rtol=1e-12, atol=0)
    assert set(parts) == {2**24}
    want = ((images.double() - target.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(whole, 10 * (255**2 / want).log10(), rtol=1e-12, atol=0)
