import math
import pickle
import random

import pytest
import torch

from fewstep.metrics.scores import Scores, mean_error


def test_mean_and_standard_error():
    """1, 2, 6: mean 3, variance (4 + 1 + 9) / 2, over 3."""
    assert mean_error(torch.tensor([1.0, 2, 6])) == (3, pytest.approx(math.sqrt(7 / 3)))
    value, error = mean_error(torch.tensor([5.0]))
    assert value == 5
    assert math.isnan(error)


def test_images_of_one_prompt_are_no_samples_of_their_own():
    """Two prompts of unequal numbers: squares of the sums of differences; a value each, and one prompt, as without."""
    values = torch.tensor([1.0, 2, 6, 7])  # mean 4: differences -3, -2, 2, 3
    value, error = mean_error(values, [0, 0, 5, 0])
    assert (value, error) == (4, pytest.approx(math.sqrt(2 * (4 + 4)) / 4))
    plain = (4, pytest.approx(values.std().item() / 2))
    assert mean_error(values, [3, 1, 0, 2]) == mean_error(values, [1] * 4) == mean_error(values) == plain
    # equal numbers: that of the prompts' means
    assert mean_error(values, [0, 0, 1, 1]) == mean_error(torch.tensor([1.5, 6.5]))
    # as it scatters when prompts and images are drawn anew
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 32, 1, generator=generator) + 0.5 * torch.randn(400, 32, 4, generator=generator)
    prompts = [i // 4 for i in range(128)]
    errors = torch.tensor([mean_error(draw.flatten(), prompts)[1] for draw in draws])
    assert errors.square().mean().sqrt().item() == pytest.approx(draws.mean((1, 2)).std().item(), rel=0.1)


def test_order_batches_processes_and_repetition_do_not_matter():
    """Values whose float sum depends on the order; the last batch of the second process repeats the first image."""
    values = 10.0 ** torch.tensor([16.0, -3, 5, 15, 1, -8, 16, 9, 2, 3, 12]).double()
    whole = Scores()
    whole.update(range(11), x=values, y=-values)
    order = list(range(11))
    random.Random(0).shuffle(order)
    one, two = Scores(), Scores()
    for process, rows in ((one, order[:1]), (one, order[1:6]), (two, order[6:8]), (two, [*order[8:], order[0]])):
        process.update(rows, x=values[rows], y=-values[rows])
    both = one + pickle.loads(pickle.dumps(two))
    assert both.figures() == (two + one).figures() == whole.figures()
    assert both.keys("x") == list(range(11))
    assert torch.equal(both.column("x"), values)
    assert len(one.keys("x")) == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_key(bad):
    with pytest.raises(ValueError, match="lpips: the value of number 7 is"):
        Scores().update([3, 7], lpips=torch.tensor([0.5, bad]))
    with pytest.raises(ValueError, match=r"lpips: needs one value for each of 2 keys; got \(3,\)"):
        Scores().update([3, 7], lpips=torch.zeros(3))
