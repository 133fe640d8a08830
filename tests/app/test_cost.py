"""What a batch costs: which runs are counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fewstep.app.cost import at_batch_sizes
from fewstep.distill.evaluation import Sampler


def test_the_first_run_of_a_batch_size_is_not_counted():
    """It alone calls the network twice here, as a compiled one is slow once; prompts and seeds are repeated in turn."""
    network = nn.Identity()
    asked: list[tuple[list[str], list[int]]] = []

    def images(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        again = (list(prompts), list(seeds)) in asked
        asked.append((list(prompts), list(seeds)))
        for _ in range(1 if again else 2):
            network(torch.zeros(len(prompts)))
        return torch.zeros(len(prompts), 3, 2, 2)

    sampler = Sampler("a", "student", 1, 1.0, "ddim", [network], None, None, images)
    found = at_batch_sizes(sampler, ["x", "y"], [7, 8], sizes=[2, 3])
    assert [(cost.images, cost.rows) for cost in found] == [(2, 2)] * 3 + [(3, 3)] * 3
    assert asked == [(["x", "y"], [7, 8])] * 4 + [(["x", "y", "x"], [7, 8, 7])] * 4
