"""A trajectory student of several step counts: what is drawn, and what its first step can and cannot be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from fewstep.distill.random import Rngs
from tests.distill.exact import prompts_of
from tests.distill.gaussian import PROCESSES, Teacher, affine, calls, method, under_training


def test_one_count_is_drawn_for_all_rows(tmp_path: Path):
    """Uniform over the counts; every row's step is one of that count's, for both roles and on every process."""
    teacher = Teacher(PROCESSES["flow"], [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="tdm", steps=[1, 2, 4])
    seen: Counter[int] = Counter()
    for i in range(300):
        counts = set()
        for rank in range(2):
            rngs = Rngs(0, i, range(2 * rank, 2 * rank + 2))
            draws = made.draw(prompts_of(teacher, [""] * 2), rngs, i, ["student", "fake_score"])
            for point in draws.points.values():
                lengths = point.start - point.to
                counts |= set((1 / lengths).round().int().tolist())
                assert torch.allclose((point.to / lengths).round() * lengths, point.to)  # one of that count's ends
        assert len(counts) == 1
        seen[counts.pop()] += 1
    assert sorted(seen) == [1, 2, 4]
    assert all(abs(n - 100) < 33 for n in seen.values())  # four deviations


def test_the_cost_is_the_mean_over_the_counts(tmp_path: Path):
    teacher = Teacher(PROCESSES["flow"], [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="tdm", steps=[1, 4], train_batch_size=2)
    trainer = under_training(tmp_path, made, teacher, [""] * 2)
    rows = {}
    for i in range(40):
        with calls(made) as seen:
            trainer.step(i)
        free = sum(c.rows for c in seen if not c.graph) / 2
        rows.setdefault(free, sum(c.rows for c in seen if c.graph) / 2)
    assert set(rows) == {1 + 2 + 1, 4 + 2 + 1}
    assert set(rows.values()) == {2}
    assert made.forwards()["student and fake_score"] == {"forward": 2.5 + 2 + 1, "backward": 2}


def test_what_one_count_lacks_the_others_make_up_for(tmp_path: Path):
    """Flow, N(0, 0.5^2), counts 1 and 2: both begin with one call, and no gain of it serves both.

    One step wants the gain 0.5; the half way of two wants (v - sigma) / alpha, less than half of it. The trained one lies
    between, so that one step is too narrow. Below 0.5 the one fake score sees the ends of both counts equally often, and
    it is their mixture that has the teacher's variance: two steps end as much too wide.
    """
    std = 0.5
    teacher = Teacher(PROCESSES["flow"], [0.0], [std], knots=2)
    settings = {
        **{"method": "tdm", "steps": [1, 2], "guidance_scale": 1.0, "huber_c": 0.1, "train_batch_size": 8},
        **{"max_train_steps": 500, "lr_scheduler": "cosine", "learning_rate": 0.02, "fake_score_learning_rate": 0.03},
        **{"logging_steps": 1000, "checkpointing_steps": 1000},
    }
    made = method(tmp_path, teacher, **settings)
    under_training(tmp_path, made, teacher, [""]).run()
    first, second = (affine(made.student.denoiser, level, "")[0].item() for level in (1.0, 0.5))
    v = (0.25 * std**2 + 0.25) ** 0.5
    assert 1.05 * (v - 0.5) / 0.5 < first < 0.95 * std
    end = second * (0.5 * first + 0.5)
    assert (first**2 + end**2) / 2 == pytest.approx(std**2, rel=0.12)
