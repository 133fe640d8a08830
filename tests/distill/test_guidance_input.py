"""Teachers that take the guidance scale as an input (Flux): every network of a method is told it, in one call each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distill.distiller import Pairs
from fewstep.distill.methods.consistency import Draws
from fewstep.distill.random import Rngs
from fewstep.samplers.errors import UserError
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.gaussian import PROCESSES, Teacher, calls, lora, method, rows_by_backward, under_training
from tests.distill.test_consistency import batch_of, jumping, lcm, loss
from tests.distill.test_distribution_matching import LEVELS, direction, dmd2, prompts_of
from tests.pipelines import PROMPTS, tiny_stable_diffusion

SHIFT, SCALE = "0.4", 3.0


def told(name: str) -> Teacher:
    """Told w, its mean is moved by w times the shift: what guidance of scale w makes of it."""
    return Teacher(PROCESSES[name], [0.7, -0.4], [0.5, 1.3], guided=1.0)


def test_dmd2(tmp_path: Path):
    """A fake score that is the teacher's copy agrees with it exactly, if told the same scale; so starts the student."""
    teacher = told("vp")
    made = dmd2(tmp_path, teacher, guidance_scale=SCALE)
    batch = prompts_of(teacher, [SHIFT] * 4)
    x0, eps = (randn((4, 2, 8, 8), generators(range(i, i + 4))) for i in (0, 10))
    assert not direction(made, batch, x0, LEVELS, eps).any()
    with torch.no_grad():
        made.fake_score.denoiser.network.guided.zero_()
    assert direction(made, batch, x0, LEVELS, eps).abs().max() > 1e-2

    z = Rngs(0, 0, range(4)).normal("start", batch.shape)
    one = made.rollout(batch, Rngs(0, 0, range(4)), graph=False)
    torch.testing.assert_close(one, teacher.exact_x0(z, torch.tensor(1.0), 0.4 * SCALE), rtol=1e-4, atol=1e-4)
    assert made.plan(1).embedded_guidance == SCALE


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"method": "tdm", "steps": [2]}, 2),
        ({"method": "tdm", "steps": [2], "regression_weight": 1.0}, 3),
        ({"method": "dmd", "regression_metric": "squared"}, 2),
    ],
    ids=["tdm", "tdm with pairs", "dmd"],
)
def test_the_student_is_told_the_scale_in_every_call(changes: dict[str, Any], count: int, tmp_path: Path):
    """On its way, where it is trained, and in a step that pairs hold: what it is told when it samples."""
    teacher = told("flow")
    made = method(tmp_path, teacher, guidance_scale=SCALE, **changes)
    batch = prompts_of(teacher, [SHIFT] * 2)
    if made.config.regression_weight:
        z = randn((2, *batch.shape), generators([0, 1]))
        assert batch.condition is not None
        batch.pairs = Pairs(z, z, batch.condition, z[:, None])
    seen: list[Any] = []
    made.student.denoiser.network.register_forward_hook(lambda network, args, output: seen.append(args[3]))
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student"])
    list(made.loss("student", batch, draws, 0))
    assert [g if g is None else g.tolist() for g in seen] == [[SCALE] * 2] * count


def test_a_unet_that_is_told_nothing_is_told_1(tmp_path: Path):
    """Unguided, the teacher is told no scale and its fake score 1: as LoRAs at zero they agree to the bit."""
    pipeline = tiny_stable_diffusion(guidance_input=True)
    made = lora(tmp_path, pipeline, perturbed=False, method="dmd2", guidance_scale=1.0)
    batch = prompts_of(made.student.denoiser, PROMPTS * 2)
    x0, eps = (randn((4, *batch.shape), generators(range(i, i + 4))) for i in (0, 10))
    assert not direction(made, batch, x0, LEVELS, eps).any()


def test_lcm(tmp_path: Path):
    """The exact map of the told scale has a residual of O(gap^2); one that is told nothing is off by two means."""
    teacher = told("flow_shifted")
    made = lcm(tmp_path, teacher, guidance_scale=SCALE, huber_c=1e-9)
    jumping(made, 0.0)
    with torch.no_grad():
        for role in (made.student, made.target):
            role.denoiser.network.gain.fill_(1)
    batch = batch_of(teacher, [SHIFT] * 3)
    u, eps = torch.tensor([0.5, 0.7, 0.9]).double(), randn((3, 2, 8, 8), generators([7, 8, 9]))
    found = {}
    for n in (40, 80):
        t, s = (made.noise.shift(v).float() for v in (u, u - 1 / n))
        found[n] = loss(made, batch, Draws(t, s, eps, SCALE)).item()
    assert found[40] / found[80] == pytest.approx(4, rel=0.05)
    with torch.no_grad():
        made.target.denoiser.network.guided.zero_()
    assert loss(made, batch, Draws(t, s, eps, SCALE)).item() > 100 * found[80]

    assert made.plan(1).embedded_guidance == SCALE
    assert lcm(tmp_path, teacher, guidance_scale=SCALE, guidance_scale_max=7.0).plan(1).embedded_guidance == 5


def test_pretrain(tmp_path: Path):
    """What it declares is told the scale, not guided by two calls; without one 1, as in training."""
    for scale, expected in ((2.0, 2.0), (None, 1.0)):
        made = method(tmp_path, told("flow"), method="pretrain", validation_guidance_scale=scale)
        plan = made.plan(50)
        assert (plan.embedded_guidance, plan.nfe) == (expected, 50)


@pytest.mark.parametrize("build", [dmd2, lcm])
def test_the_teacher_is_one_call(build: Callable[..., Any], tmp_path: Path):
    """Rows through the networks in an iteration, divided by the batch, as declared."""
    teacher = told("flow")
    made = build(tmp_path, teacher, guidance_scale=SCALE, train_batch_size=2)
    trainer = under_training(tmp_path, made, teacher, [SHIFT] * 2)
    with calls(made) as seen:
        trainer.step(0)
    rows = rows_by_backward(seen, 2)
    (declared, *_) = made.forwards().values()
    assert (
        declared == {"forward": rows[False], "backward": rows[True]} == {"forward": 2, "backward": len(made.updates(0))}
    )


def test_a_teacher_that_is_told_its_scale_has_one(tmp_path: Path):
    """The student is told the same: of a range it would be told one and learn another."""
    with pytest.raises(UserError, match="guidance_scale_max: this teacher is told its scale, as the student is"):
        dmd2(tmp_path, told("flow"), guidance_scale=2.0, guidance_scale_max=4.0)
