"""Procedures around the distribution matching family: what the student is held to changes while it is trained.

Imports no torch.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from fewstep.distill.family_config import DistributionMatchingConfig


class DisBackConfig(DistributionMatchingConfig, frozen=True):
    """Score distillation against a teacher that walks back from the student, node by node (arXiv:2408.15991)."""

    method: Literal["disback"]
    steps: list[PositiveInt] = Field([1], min_length=1)
    fake_score_warmup_steps: int = Field(200, ge=0)
    fake_score_prompt_dropout: float = Field(0.1, ge=0, lt=1)

    nodes: int = Field(
        5, ge=0, description="N: the fake score's warm-up is recorded from the teacher, 0, to the student, N; 0: plain"
    )
    node_steps: int = Field(100, ge=1, description="iterations with each node as the target, N - 1 first")
    path_share: float = Field(
        0.95, ge=0, lt=1, description="of the way that the warm-up is taken to go; 0 records at even iterations"
    )

    @model_validator(mode="after")
    def _path(self) -> DisBackConfig:
        if self.nodes == 0:
            return self
        if self.regression_warmup_steps:
            raise ValueError(
                f"nodes {self.nodes}: not with regression_warmup_steps: the path is recorded from the run's beginning"
            )
        if self.step_conditioned:
            raise ValueError(f"nodes {self.nodes}: not with step_conditioned: a target is told no number of a step")
        if self.policy == "phases":
            raise ValueError(
                f"nodes {self.nodes}: not with policy phases: a path is of one network, each phase has its own"
            )
        at = [] if self.nodes > self.fake_score_warmup_steps else self.record_steps
        if len({0, *at}) <= self.nodes:
            raise ValueError(
                f"nodes {self.nodes}: fake_score_warmup_steps {self.fake_score_warmup_steps} are too few to record them"
                f"{' after ' + ', '.join(map(str, at)) + ' iterations' if at else ''}; take more, or fewer nodes"
            )
        if self.max_train_steps <= self.arrival:
            raise ValueError(
                f"nodes {self.nodes}: the teacher is the target from iteration {self.arrival}, and max_train_steps is "
                f"{self.max_train_steps}: the student would never learn it"
            )
        if self.needs_ratio and self.gan_warmup_steps < self.arrival:
            raise ValueError(
                f"gan_warmup_steps {self.gan_warmup_steps}: {self.divergence}'s ratio is of the teacher, which is the target "
                f"from iteration {self.arrival}; give at least that"
            )
        return self

    @property
    def record_steps(self) -> list[int]:
        """After how many updates of the fake score the nodes 1..N are recorded.

        A regression nears its optimum as 1 - e^(-r tau), tau the updates counted by the warm-up of the learning rate:
        nodes at even shares of the way are at these, where the last has gone `path_share` of it.
        """
        n, q = self.fake_score_warmup_steps, self.path_share
        tau = list(accumulate(map(self.warm, range(n)), initial=0.0))
        shares = [j / self.nodes for j in range(1, self.nodes + 1)]
        ends = [tau[n] * (math.log1p(-q * s) / math.log1p(-q) if q else s) for s in shares]
        return [min(range(n + 1), key=lambda i: abs(tau[i] - end)) for end in ends]

    @property
    def arrival(self) -> int:
        """The first iteration whose target is the teacher."""
        return self.fake_score_warmup_steps + max(self.nodes - 1, 0) * self.node_steps

    def node(self, iteration: int) -> int:
        """Number of the node that is the student's target: a function of the iteration, so that resume carries nothing."""
        since = max(iteration - self.fake_score_warmup_steps, 0)
        return max(self.nodes - 1 - since // self.node_steps, 0)
