"""A trajectory student of several step counts: what is drawn, and what its first step can and cannot be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill.config import ConfigError
from fewstep.distill.networks import Networks
from fewstep.distill.random import Rngs
from fewstep.distill.run import methods_distiller
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.noise import NoiseProcess
from tests.closed_form import posterior
from tests.distill.exact import prompts_of
from tests.distill.gaussian import (
    PROCESSES,
    Network,
    Teacher,
    affine,
    calls,
    lora,
    method,
    rows_by_backward,
    under_training,
)
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion, tiny_stable_diffusion_3


@pytest.mark.parametrize(("steps", "times"), [([1, 2, 4], [100, 100, 100]), ([1, 1, 1, 2, 4], [180, 60, 60])])
def test_one_count_is_drawn_for_all_rows(tmp_path: Path, steps: list[int], times: list[int]):
    """As often as it is given; every row's step is one of that count's, for both roles and on every process."""
    teacher = Teacher(PROCESSES["flow"], [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="tdm", steps=steps)
    seen: Counter[int] = Counter()
    for i in range(300):
        counts = set()
        for rank in range(2):
            rngs = Rngs(0, i, range(2 * rank, 2 * rank + 2))
            draws = made.draw(prompts_of(teacher, [""] * 2), rngs, i, ["student", "fake_score"])
            point = draws.point
            assert point is not None
            lengths = point.start - point.to
            counts |= set((1 / lengths).round().int().tolist())
            assert torch.allclose((point.to / lengths).round() * lengths, point.to)  # one of that count's ends
        assert len(counts) == 1
        seen[counts.pop()] += 1
    assert tuple(sorted(seen)) == made.step_counts == (1, 2, 4)
    assert all(abs(seen[k] - n) < 4 * (n * (1 - n / 300)) ** 0.5 for k, n in zip((1, 2, 4), times, strict=True))


def test_the_cost_is_the_mean_over_the_counts(tmp_path: Path):
    teacher = Teacher(PROCESSES["flow"], [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="tdm", steps=[1, 4], train_batch_size=2)
    trainer = under_training(tmp_path, made, teacher, [""] * 2)
    rows = {}
    for i in range(40):
        with calls(made) as seen:
            trainer.step(i)
        by_backward = rows_by_backward(seen, 2)
        rows.setdefault(by_backward[False], by_backward[True])
    assert set(rows) == {0 + 2 + 1, 3 + 2 + 1}
    assert set(rows.values()) == {2}
    assert made.forwards()["student and fake_score"] == {"forward": 1.5 + 2 + 1, "backward": 2}


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


# a fake score that is told the step


class Numbered(Network):
    """With a mean and a standard deviation for each number that it is told."""

    def __init__(self, noise: NoiseProcess, mean: Tensor, std: Tensor, knots: int, shape: tuple[int, ...]):
        super().__init__(noise, mean, std, knots, shape, guided=0.0)
        self.means, self.stds = (nn.Parameter(torch.zeros(8, *shape)) for _ in range(2))

    def forward(self, x_t: Tensor, time: Tensor, shift: Tensor, guidance: Tensor | None = None) -> Tensor:
        assert guidance is not None
        number = guidance.round().long()
        t = self.noise.from_model_time(time).to(x_t.dtype)
        mean = self.mean + self.means[number] + shift.reshape(-1, 1, 1, 1)
        return self.noise.output(*posterior(self.noise, x_t, t, mean, (self.log_std + self.stds[number]).exp()), t)


class Telling(Teacher):
    """A teacher whose network can be widened to `Numbered`."""

    def with_guidance_input(self) -> Teacher:
        wide = Telling(self.noise, self.mean.flatten().tolist(), self.std.flatten().tolist(), self.side)
        one = (len(self.mean), 1, 1)
        wide.networks = {"network": Numbered(self.noise, self.mean, self.std, len(self.network.scale) - 1, one)}
        return wide


def test_told_apart_every_count_is_exact(tmp_path: Path):
    """The same teacher, from a level for each count and with a fake score that knows whose end it sees: both are right."""
    std = 0.5
    teacher = Telling(PROCESSES["flow"], [0.0], [std], knots=10)
    settings = {
        **{"method": "tdm", "steps": [1, 2], "guidance_scale": 1.0, "huber_c": 0.1, "train_batch_size": 8},
        **{"max_train_steps": 500, "lr_scheduler": "cosine", "learning_rate": 0.02, "fake_score_learning_rate": 0.03},
        **{"logging_steps": 1000, "checkpointing_steps": 1000, "start_gap": 0.2, "step_conditioned": True},
    }
    made = method(tmp_path, teacher, **settings)
    with torch.no_grad():  # the one step begins at a gain of 0, and a law with mean 0 does not tell a sign
        made.student.denoiser.network.scale[-1] -= 0.1
    under_training(tmp_path, made, teacher, [""]).run()
    one, first, second = (affine(made.student.denoiser, level, "")[0].item() for level in (1.0, 0.8, 0.4))
    # from N(0, 1) at 0.8, where the teacher's own is hardly wider: x = alpha_s x0 + sigma_s eps
    middle = 0.6 * first + 0.4 * (1 - 0.2 * first) / 0.8
    assert one == pytest.approx(std, rel=0.06)
    assert second * middle == pytest.approx(std, rel=0.06)


def test_the_fake_score_alone_is_told_which_step_of_which_count(tmp_path: Path):
    """Steps of one count are 0, those of two 1 and 2, of four 3 to 6: in its own loss and in the student's."""
    teacher = Telling(PROCESSES["flow"], [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="tdm", steps=[4, 1, 2], step_conditioned=True, guidance_scale=1.0)
    told: dict[str, list[Tensor | None]] = {"teacher": [], "student": [], "fake_score": []}
    for name, role in made.roles().items():
        role.denoiser.network.register_forward_pre_hook(lambda _, inputs, name=name: told[name].append(inputs[3]))
    batch, numbers = prompts_of(teacher, [""] * 32), {1: {0}, 2: {1, 2}, 4: {3, 4, 5, 6}}
    seen = set()
    for i in range(9):
        draws = made.draw(batch, Rngs(0, i, range(32)), i, ["student", "fake_score"])
        assert draws.point is not None
        count = round(1 / (draws.point.start - draws.point.to)[0].item())
        for role in ("student", "fake_score"):
            told["fake_score"].clear()
            list(made.loss(role, batch, draws, i))
            (given,) = told["fake_score"]
            assert given is not None
            assert set(given.int().tolist()) == numbers[count]
        seen.add(count)
    assert seen == {1, 2, 4}
    assert set(told["teacher"]) == set(told["student"]) == {None}


def test_shared_levels_are_all_above_where_a_step_ends(tmp_path: Path):
    """Up to the first level for every step; within the step by default."""
    teacher = Telling(PROCESSES["flow"], [0.0], [1.0], side=1)
    above: dict[bool, set[bool]] = {True: set(), False: set()}
    for separate in above:
        settings = {"separate_levels": separate, "step_conditioned": not separate}
        made = method(tmp_path, teacher, method="tdm", steps=[4], **settings)
        for i in range(20):
            draws = made.draw(prompts_of(teacher, [""] * 8), Rngs(0, i, range(8)), i, ["student", "fake_score"])
            point = draws.point
            assert point is not None
            for role in ("student", "fake_score"):
                assert (draws.t[role] >= point.to).all()
                assert (draws.t[role] <= point.start).all()
                above[separate] |= set((draws.t[role] > point.to + 0.26).tolist())
    assert above == {True: {False}, False: {True, False}}


def test_a_network_is_widened_for_the_fake_score_alone(tmp_path: Path):
    """Stable Diffusion's UNet: it starts as the teacher whatever it is told, learns to tell, and the student has no such
    input.
    """
    teacher = denoiser_of(tiny_stable_diffusion())
    settings = config(tmp_path, method="tdm", student="full", steps=[1, 2], step_conditioned=True, learning_rate=0.01)
    made = methods_distiller(settings, Networks(teacher, "full"))
    fake = made.roles()["fake_score"].denoiser
    assert (fake.takes_guidance, made.roles()["student"].denoiser.takes_guidance) == (True, False)
    batch = prompts_of(teacher, PROMPTS)
    assert batch.condition is not None
    x, t = torch.randn(2, *teacher.latent_shape()), torch.tensor([0.5, 0.7])

    def said(number: float) -> Tensor:
        assert batch.condition is not None
        with torch.no_grad():
            return fake.x0(x, t, batch.condition.with_guidance(number))

    with torch.no_grad():
        start = teacher.x0(x, t, batch.condition)
    assert torch.equal(said(0.0), start)
    assert torch.equal(said(2.0), start)
    trainer = under_training(tmp_path, made, teacher, PROMPTS)
    for i in range(3):
        trainer.step(i)
    assert not torch.allclose(said(0.0), said(2.0), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"separate_levels": False}, "each with a law of its own; set step_conditioned: true"),
        ({"policy": "backward_simulation", "step_conditioned": True}, "step_conditioned: of policy trajectory"),
        ({"policy": "phases", "separate_levels": False}, "separate_levels: of policy trajectory"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, method="tdm", **changes)


def test_what_has_no_input_for_the_number_is_refused(tmp_path: Path):
    """Adapters add no layer, and a network that is told its guidance scale has its input taken."""
    with pytest.raises(UserError, match="a new input, which no adapter adds; set student: full"):
        lora(tmp_path, tiny_stable_diffusion(), method="tdm", step_conditioned=True)
    with pytest.raises(UserError, match="one further input is told its guidance scale"):
        method(tmp_path, Teacher(PROCESSES["flow"], [0.0], [1.0], guided=1.0), method="tdm", step_conditioned=True)
    settings = config(tmp_path, method="tdm", student="full", step_conditioned=True)
    networks = Networks(denoiser_of(tiny_stable_diffusion_3()), "full")
    with pytest.raises(UserError, match="step_conditioned: StableDiffusion3Pipeline: its network cannot be given"):
        methods_distiller(settings, networks)
