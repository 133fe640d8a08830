"""Which samples and draws a micro-batch holds does not depend on how an iteration is split."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fewstep.distill.batches import Batches
from fewstep.distill.data import Prompts
from fewstep.samplers.condition import Condition

N = 10
CONDITION = Condition({"hidden": torch.arange(2.0 * N).reshape(N, 2)}, N, {"hidden": torch.full((1, 2), -1.0)})
LATENTS = torch.arange(3.0 * N).reshape(N, 3)


class Captioned(Prompts):
    """Two captions a sample: its own, or the first one."""

    def caption(self, i: int, u: float) -> int:
        return i if u < 0.5 else 0


def batches(size: int, accumulation: int = 1, rank: int = 0, world: int = 1, seed: int = 3) -> Batches:
    data = Captioned([f"prompt {i}" for i in range(N)])
    return Batches(data, (3,), CONDITION, LATENTS, seed, size, accumulation, rank, world)


def rows(some: Batches, iteration: int) -> list[tuple]:
    """All that each row of an iteration is given: prompt, condition, latent, and a draw."""
    found = []
    for micro in range(some.accumulation):
        batch, rng = some(iteration, micro)
        assert batch.condition is not None
        assert batch.x0 is not None
        assert batch.size == batch.condition.size == len(batch.x0) == some.batch_size
        assert batch.condition.negative["hidden"].equal(CONDITION.negative["hidden"])
        hidden, noise = batch.condition.tensors["hidden"].tolist(), rng.normal("noise", (2,)).tolist()
        found += list(
            zip(batch.prompts, map(tuple, hidden), map(tuple, batch.x0.tolist()), map(tuple, noise), strict=True)
        )
    return found


@pytest.mark.parametrize("iteration", [0, 1, 2, 7])
@pytest.mark.parametrize(("size", "accumulation", "world"), [(2, 3, 1), (3, 2, 1), (3, 1, 2), (1, 3, 2), (1, 1, 6)])
def test_any_split_of_an_iteration_holds_the_same_rows(size: int, accumulation: int, world: int, iteration: int):
    """Six rows an iteration of ten samples, so that epochs end inside of iterations and micro-batches."""
    whole = rows(batches(6), iteration)
    split = [row for rank in range(world) for row in rows(batches(size, accumulation, rank, world), iteration)]
    assert sorted(split) == sorted(whole)
    assert len(set(whole)) == 6


def test_a_row_is_of_one_sample():
    """Caption, condition and latent belong together."""
    for _ in range(3):
        for prompt, hidden, latent, _noise in rows(batches(6), 4):
            caption = int(prompt.removeprefix("prompt "))
            assert hidden == (2 * caption, 2 * caption + 1)
            assert caption in (0, latent[0] / 3)


def test_every_sample_once_an_epoch():
    """Five iterations of six rows are three epochs of ten samples, each in another order."""
    seen = [latent[0] / 3 for i in range(5) for _, _, latent, _ in rows(batches(6), i)]
    epochs = [seen[k : k + N] for k in range(0, 3 * N, N)]
    assert all(Counter(epoch) == Counter(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert seen != [latent[0] / 3 for i in range(5) for _, _, latent, _ in rows(batches(6, seed=4), i)]


def test_iterations_may_be_asked_for_in_any_order():
    """Resume starts in the middle: nothing is carried from one call to the next."""
    asked = batches(6)
    later, earlier = rows(asked, 9), rows(asked, 2)
    assert (earlier, later) == (rows(batches(6), 2), rows(batches(6), 9))


def test_captions_are_drawn_anew_in_each_epoch():
    seen = {(latent, prompt) for i in range(30) for prompt, _, latent, _ in rows(batches(5), i)}
    assert len(seen) == 2 * N - 1  # the first sample has one caption


def test_a_data_set_smaller_than_a_batch():
    few = Batches(Prompts(["a", "b"]), (3,), None, None, 0, 5)
    batch, _ = few(0, 0)
    assert Counter(batch.prompts[:4]) == {"a": 2, "b": 2}
    assert batch.condition is None
    assert batch.x0 is None


class Bucketed(Prompts):
    """Ten samples: seven wide ones, three tall ones."""

    bucket = (0, 0, 1, 0, 0, 1, 0, 1, 0, 0)

    def __init__(self) -> None:
        super().__init__([f"prompt {i}" for i in range(N)])
        self.bucket_of = list(self.bucket)


def test_a_micro_batch_is_of_one_bucket():
    """With its shape; whatever the processes, an iteration holds the same groups, with the same draws."""
    shapes = [(4, 8, 16), (4, 16, 8)]
    found = {}
    for accumulation, world in ((4, 1), (2, 2), (1, 4)):
        seen = []
        for rank in range(world):
            some = Batches(Bucketed(), (4, 8, 8), None, None, 3, 2, accumulation, rank, world, shapes=shapes)
            for iteration in range(3):
                for micro in range(accumulation):
                    batch, rng = some(iteration, micro)
                    (bucket,) = {Bucketed.bucket[int(p.removeprefix("prompt "))] for p in batch.prompts}
                    assert batch.shape == shapes[bucket]
                    seen.append((iteration, rng.indices[0], batch.prompts, rng.normal("x", (1,)).tolist()))
        found[world] = sorted(seen)
    assert found[1] == found[2] == found[4]
    prompts = [
        p for _, _, group, _ in found[1][:6] for p in group
    ]  # an epoch: four groups of the wide, two of the tall
    assert set(prompts) == {f"prompt {i}" for i in range(N)}
