"""A draw is a function of (seed, stream, iteration, index), and of nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.distill.random import Rngs, permutation

DRAWS: dict[str, Callable[[Rngs, str], Tensor]] = {
    "normal": lambda rng, stream: rng.normal(stream, (2, 3)),
    "uniform": lambda rng, stream: rng.uniform(stream),
    "integers": lambda rng, stream: rng.integers(stream, 3, 1000),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@every_draw
def test_a_draw_depends_on_its_index_alone(draw: Callable[[Rngs, str], Tensor]):
    """Any split into micro-batches and processes, any order, and whatever was drawn before."""
    whole = draw(Rngs(5, 7, range(8)), "a")
    busy = Rngs(5, 7, [6, 1, 3])
    for stream in ("b", "a", "c"):
        busy.normal(stream, (50,))
    torch.manual_seed(123)
    assert draw(busy, "a").equal(whole[[6, 1, 3]])
    assert torch.cat([draw(Rngs(5, 7, range(i, i + 2)), "a") for i in range(0, 8, 2)]).equal(whole)
    assert len(whole.unique(dim=0)) == 8


@every_draw
def test_a_draw_depends_on_seed_stream_and_iteration(draw: Callable[[Rngs, str], Tensor]):
    """Also where two keys would read the same if they were only strung together (1, 12) and (11, 2)."""
    keys = [(5, "a", 7), (6, "a", 7), (5, "b", 7), (5, "a", 8), (1, "a", 12), (11, "a", 2)]
    values = torch.stack([draw(Rngs(seed, i, range(4)), stream).flatten() for seed, stream, i in keys])
    assert len(values.unique(dim=0)) == len(keys)


def test_shared_is_one_draw_for_all_rows():
    draws = [torch.rand(1, generator=Rngs(5, 7, rows).shared("a")) for rows in (range(4), range(4, 8))]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(Rngs(5, 7, [0]).uniform("a"))
    assert not draws[0].equal(torch.rand(1, generator=Rngs(5, 8, range(4)).shared("a")))


def test_moments():
    """Of 20,000 rows with one number each: four standard errors."""
    rng = Rngs(0, 0, range(20_000))
    x, u, k = rng.normal("x", (1,)).flatten().double(), rng.uniform("u").double(), rng.integers("k", 2, 5)
    assert abs(x.mean()) < 4 / 20_000**0.5
    assert abs(x.var() - 1) < 4 * (2 / 20_000) ** 0.5
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5
    assert u.min() >= 0
    assert u.max() < 1
    assert k.unique().tolist() == [2, 3, 4]
    assert (abs(k.bincount(minlength=5)[2:] / 20_000 - 1 / 3) < 4 * (2 / 9 / 20_000) ** 0.5).all()


def test_permutation_is_of_its_epoch():
    orders = [permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(50, 0, 1).tolist() == orders[1]
