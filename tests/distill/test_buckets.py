"""Sizes of buckets, the bucket of an image, and the order of groups: functions of their arguments alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from fewstep.distill.buckets import Groups, make_buckets, nearest


@pytest.mark.parametrize(("height", "width", "step"), [(512, 512, 64), (768, 512, 64), (16, 16, 8), (1024, 1024, 32)])
def test_buckets_keep_the_area_and_the_steps(height: int, width: int, step: int):
    """None has more pixels than asked for, nor could both sides grow by a step; each is there turned by a quarter too."""
    found = make_buckets(height, width, step)
    assert (height, width) in found
    root = math.isqrt(height * width)
    for h, w in found:
        assert h * w <= height * width
        if (h, w) != (height, width):
            assert h % step == w % step == 0
            assert root // 2 <= min(h, w)
            assert max(h, w) <= 2 * root
            assert (w, h) in found
            assert max((h + step) * w, h * (w + step)) > height * width or max(h, w) + step > 2 * root
    assert [h / w for h, w in found] == sorted(h / w for h, w in found)


def test_limits_of_the_sides():
    assert make_buckets(512, 512, 128, 384, 640) == [(384, 640), (512, 512), (640, 384)]


def test_the_nearest_shape():
    """By ratio, so that 2 : 1 and 1 : 2 are as far from a square."""
    sizes = [(256, 1024), (512, 512), (1024, 256)]
    shapes = ((100, 199), (100, 201), (199, 100), (201, 100), (1, 9), (4000, 4100))  # 4 : 1 is twice as far as 2 : 1
    assert [nearest(sizes, *shape) for shape in shapes] == [1, 0, 1, 2, 0, 1]


BUCKET_OF = [0, 1, 0, 2, 1, 0, 0, 1, 0, 0, 1]  # six, four, one


def test_a_group_is_of_one_bucket_and_none_is_left_out():
    """Of three: two full groups of six; four are filled to six with two of themselves; one is thrice itself."""
    groups = Groups(BUCKET_OF, 3, seed=5)
    assert groups.count == 5
    for epoch in range(3):
        drawn = [groups(epoch * 5 + i) for i in range(5)]
        assert all(len({BUCKET_OF[k] for k in g}) == 1 and len(g) == 3 for g in drawn)
        times = Counter(k for g in drawn for k in g)
        assert [times[k] for k in (0, 2, 5, 6, 8, 9)] == [1] * 6
        assert sorted(times[k] for k in (1, 4, 7, 10)) == [1, 1, 2, 2]
        assert times[3] == 3


def test_groups_may_be_asked_for_in_any_order():
    """Nothing is carried from one call to the next; epochs and seeds differ."""
    groups = Groups(BUCKET_OF, 3, 5)
    later, first = groups(12), groups(0)
    assert (first, later) == (Groups(BUCKET_OF, 3, 5)(0), Groups(BUCKET_OF, 3, 5)(12))
    orders = [[tuple(Groups(BUCKET_OF, 3, s)(e * 5 + i)) for i in range(5)] for s, e in ((5, 0), (5, 1), (6, 0))]
    assert len({tuple(order) for order in orders}) == 3
