"""Steps of a trajectory that are held to the teacher's: the pairs' states, the map that each step is held to, step counts.

The regression of one step is in `test_regression.py`, how pairs are made and kept in `test_pairs.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Batch, Pairs
from fewstep.distill.networks import require_grad
from fewstep.distill.objectives.levels import ends, even_levels
from fewstep.distill.objectives.policy import paired_step
from fewstep.distill.objectives.regression import held_to
from fewstep.distill.random import Rngs
from fewstep.samplers import rules
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators, plan_of_levels
from fewstep.samplers.rules import randn
from fewstep.samplers.stock import stock
from tests.distill.exact import SHIFT, prompts_of
from tests.distill.gaussian import PROCESSES, Teacher, lora, method
from tests.distill.runs import config
from tests.distill.test_pairs import SHIFTS, gaussian, made
from tests.distill.test_tdm import MEAN, STD, exact_steps
from tests.pipelines import tiny_stable_diffusion, tiny_stable_diffusion_3

HELD: dict[str, Any] = {"method": "tdm", "guidance_scale": 2.0, "regression_weight": 1.0}
LOST = ["vp_v_zero_snr", "flow", "flow_shifted"]
"""Processes whose last level is pure noise: the teacher's ODE from z keeps the marginals."""


def exact_pairs(student: Any, teacher: Teacher, n: int = 64) -> Batch:
    """Of the exact ODE of the guided teacher, whose shift is twice the prompt's, with its states between the steps."""
    z = randn((n, *teacher.latent_shape()), generators(range(n))).double()
    top, levels = torch.ones(n).double(), ends(student.config, student.noise)
    states = [
        teacher.exact_ode(z, top, student.noise.shift(torch.full((n,), v).double()), 2 * SHIFT) for v in [*levels, 0.0]
    ]
    batch = prompts_of(teacher, [str(SHIFT)] * n)
    assert batch.condition is not None
    batch.pairs = Pairs(z, states[-1], batch.condition, torch.stack(states[:-1], 1) if levels else None)
    return batch


def held(student: Any, batch: Batch, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What steps of a plan of `count` are held to, one in each row."""
    assert batch.pairs is not None
    return paired_step(batch.pairs, student.plan(count), student.ends, Rngs(0, 0, range(batch.size)), student.noise)


@pytest.mark.parametrize("name", PROCESSES)
def test_states_are_the_teachers_ode(name: str, tmp_path: Path):
    """Between z and x, where steps of every count end, whichever level it starts from; twice the steps halve the error."""
    teacher, n, errors = gaussian(name), 8, []
    for steps in (50, 100):
        settings = {"method": "tdm", "regression_weight": 1.0, "steps": [1, 2, 4], "init_level": 0.98}
        settings |= {"start_gap": 0.04} if name != "edm" else {}
        found = made(tmp_path, teacher, num_pairs=n, pair_steps=steps, **settings)
        rows = found[range(n)]
        prompts = [SHIFTS[c] for c in found.captions]
        shift = 2 * torch.tensor([float(p) for p in prompts]).double().reshape(-1, 1, 1, 1)
        levels = ends(config(tmp_path, **settings), teacher.noise)
        wanted = [0.675, 0.47, 0.45, 0.225] if name != "edm" else [0.735, 0.49, 0.245]
        assert levels == pytest.approx(wanted, abs=1e-3)
        top = torch.ones(n).double()
        start = max(1.0, teacher.noise.sigma(top)[0].item()) * rows["z"].double()
        for i, level in enumerate(levels):
            to = teacher.noise.shift(torch.full((n,), level).double())
            errors.append((rows["between"][:, i] - teacher.exact_ode(start, top, to, shift)).abs().max().item())
    first, second = errors[: len(levels)], errors[len(levels) :]
    assert max(second) < 0.15
    assert all(b < 0.75 * a for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", PROCESSES)
def test_held_to_undoes_the_ode_rule(name: str):
    """In float64, for levels of each row, down to s = 0, where it is x_s."""
    noise = PROCESSES[name]
    x_t, x0 = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    t, s = torch.tensor([1.0, 0.7, 0.3]).double(), torch.tensor([0.75, 0.2, 0.0]).double()
    x_s, _ = rules.ode(x_t, x0, t, s, noise)
    found = held_to(x_t, x_s, t, s, noise)
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[2], x_s[2])


@pytest.mark.parametrize("metric", ["squared", "pseudo_huber"])
@pytest.mark.parametrize("name", LOST)
def test_the_fixed_point_is_the_teachers_trajectory(name: str, metric: str, tmp_path: Path):
    """Four steps that keep the marginals have no gradient on exact pairs; other steps have."""
    teacher = Teacher(PROCESSES[name], MEAN, STD, side=2, knots=20)
    student = method(tmp_path, teacher, **HELD, steps=[4], regression_metric=metric, huber_c=0.1)
    exact_steps(student, teacher, 2 * SHIFT)
    student.student.denoiser.network.double()
    batch = exact_pairs(student, teacher)
    # the corrections were made at a shift of 2 SHIFT of the mean
    batch.pairs.condition = teacher.encode([str(2 * SHIFT)] * batch.size)  # type: ignore[union-attr]
    require_grad(student.roles(), ["student"])
    paired = held(student, batch, 4)
    assert set(paired[1].tolist()) == set(student.noise.shift(torch.tensor([1.0, 0.75, 0.5, 0.25])).tolist())
    losses = student.regression(batch, paired)
    losses.total.backward()
    scale = student.student.denoiser.network.scale
    assert losses.scalars["regression"] < 1e-9
    assert scale.grad.abs().max() < 1e-5
    with torch.no_grad():
        scale += 0.1
    scale.grad = None
    student.regression(batch, paired).total.backward()
    places = [round(20 * t) for t in set(paired[1].tolist())]
    assert len(places) == 4
    assert scale.grad[places].abs().min() > 1e-3


@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_a_gap_lets_one_network_be_exact_for_several_counts(gap: float, tmp_path: Path):
    """From one level a network cannot answer for one step and for two; from a level each it can, to the last digits."""
    teacher = Teacher(PROCESSES["flow"], MEAN, STD, side=2, knots=10)
    student = method(tmp_path, teacher, **HELD, steps=[1, 2], start_gap=gap, regression_metric="squared")
    assert student.plan(1).levels == (1.0,)
    assert student.plan(2).levels == pytest.approx((1 - gap, (1 - gap) / 2))
    network = student.student.denoiser.network.double()
    teacher.network.double()
    batch = exact_pairs(student, teacher)
    paired = [held(student, batch, count) for count in (1, 2)]
    require_grad(student.roles(), ["student"])
    optimizer = torch.optim.LBFGS([network.scale, network.offset], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:  # the surrogate's value is not the distance, its gradient is
        optimizer.zero_grad()
        both = [student.regression(batch, p) for p in paired]
        for losses in both:
            losses.total.backward()
        return sum(losses.scalars["regression"] for losses in both)  # type: ignore[return-value]

    for _ in range(3):
        optimizer.step(loss)  # type: ignore[arg-type]
    left = float(loss())
    assert left < 1e-6 if gap else left > 0.05


def test_levels_are_drawn_by_row_and_student_alone_is_held(tmp_path: Path):
    """In the student's turn alone, at steps of the count that is trained, each pair at its own, under its own prompt."""
    teacher = Teacher(PROCESSES["flow"], MEAN, STD, side=2)
    student = method(tmp_path, teacher, **HELD, steps=[1, 2, 4], start_gap=0.04)
    batch = exact_pairs(student, teacher)
    pairs = batch.pairs
    assert pairs is not None
    pairs.z, pairs.x = pairs.z.float(), pairs.x.float()
    assert pairs.between is not None
    pairs.between = pairs.between.float()
    starts = set()
    for i in range(12):
        draws = student.draw(batch, Rngs(0, i, range(batch.size)), i, ["student", "fake_score"])
        assert draws.paired is not None
        seen = {round(t, 3) for t in draws.paired[1].tolist()}
        assert seen in ({1.0}, {0.96, 0.48}, {0.92, 0.69, 0.46, 0.23})
        assert draws.point is not None
        assert {round(t, 3) for t in draws.point.start.tolist()} == seen
        starts.add(max(seen))
    assert starts == {1.0, 0.96, 0.92}
    assert student.draw(batch, Rngs(0, 0, range(batch.size)), 0, ["fake_score"]).paired is None


@pytest.mark.parametrize("changes", [{"init_level": 0.9847, "start_gap": 0.0331}, {"start": "level"}], ids=str)
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_levels_between_a_tables_entries(name: str, changes: dict[str, Any], tmp_path: Path):
    """States lie where the plans' steps end, rounded to entries once."""
    student = method(tmp_path, Teacher(PROCESSES[name], MEAN, STD), **HELD, steps=[1, 2, 4], **changes)
    found = {step.to for count in (1, 2, 4) for step in student.plan(count).steps} - {0.0}
    assert found == set(ends(student.config, student.noise))


@pytest.mark.parametrize(
    ("pipeline", "top", "grid"),
    [
        (tiny_stable_diffusion, 0.98, {1: [979], 2: [939, 469], 4: [899, 674, 449, 224]}),
        (tiny_stable_diffusion_3, None, {1: [1.0], 2: [0.96, 0.48], 4: [0.92, 0.69, 0.46, 0.23]}),
    ],
)
def test_gaps_in_plain_diffusers(pipeline: Any, top: float | None, grid: dict[int, list[float]], tmp_path: Path):
    """One stock scheduler follows all counts, each from its own first level."""
    teacher = denoiser_of(pipeline())
    student = lora(tmp_path, teacher.pipeline, method="tdm", init_level=top, start_gap=0.04, steps=[1, 2, 4])
    _, by_steps = stock(student.student.denoiser, {k: student.plan(k) for k in grid})
    for count, levels in grid.items():
        call = by_steps[count].arguments | {"sigmas": [1.0]} if levels == [1.0] else by_steps[count].arguments
        assert call.get("timesteps", call.get("sigmas")) == pytest.approx(levels)


def test_gaps_below_level_1_of_zero_terminal_snr_are_refused_with_the_remedy():
    """Euler has infinite numbers there, DDIM no levels but its own."""
    teacher = denoiser_of(tiny_stable_diffusion(prediction_type="v_prediction", zero_terminal_snr=True))
    plans = {k: plan_of_levels(even_levels(teacher.noise, k, 1 - gap)) for k, gap in ((1, 0.0), (2, 0.04))}
    with pytest.raises(UserError, match=r"plans of 1, 2 steps: no one stock scheduler .* \(init_level below 1\)"):
        stock(teacher, plans)
    assert stock(teacher, {k: plan_of_levels(even_levels(teacher.noise, k, 0.98)) for k in (1, 2)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "dmd2", "start_gap": 0.1}, "start_gap 0.1: of policy trajectory"),
        ({"method": "tdm", "steps": [1, 2, 4], "start_gap": 0.49}, "no level is left to compare scores in step 1 of 4"),
        ({"method": "tdm", "regression_weight": 1.0, "regression_metric": "lpips"}, "steps that end in noisy latents"),
        ({"method": "phased_dmd", "regression_weight": 1.0}, "or policy trajectory"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **changes)


def test_a_start_of_one_scale_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="start_gap: a start from noise of scale 5 has one level; set start_gap: 0"):
        method(tmp_path, Teacher(PROCESSES["edm"], MEAN, STD), method="tdm", steps=[1, 2], start_gap=0.1)
