"""SwiftBrush: VSD's weight, guidance of both scores, and prompts emptied for the fake score alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.distill.random import Rngs
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.exact import (
    SHIFT,
    Laws,
    assert_relative,
    exact,
    gaussian,
    levels,
    moments,
    on_the_sample,
    prompts_of,
    rows,
)
from tests.distill.gaussian import PROCESSES, Teacher, lora, method
from tests.pipelines import PROMPTS, tiny_stable_diffusion


@pytest.mark.parametrize("name", PROCESSES)
def test_gradient_moments(name: str, tmp_path: Path):
    """With nu = s/a, P = S^2 + nu^2, Q = c^2 + nu^2, both scores guided 2 (the fake's mean b' + 2 SHIFT is the student's b):

    E d = (s^3/a)(b - m)/P and E d z = (s^3/a) c (1/P - 1/Q): VSD's s^2 (eps_R - eps_F).
    """
    x = Laws()
    made = exact(tmp_path, name, x, method="swiftbrush", guidance_scale=2.0, fake_guidance_scale=2.0)
    gaussian(made, x.b - 2 * SHIFT, x.c, gain=1.0)
    a, s = levels(made)
    p, q = x.S**2 + (s / a) ** 2, x.c**2 + (s / a) ** 2
    mean, slope = moments(made, x)
    assert_relative(mean, s**3 / a * (x.b - x.m - 2 * SHIFT) / p)
    assert_relative(slope, s**3 / a * x.c * (1 / p - 1 / q))


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_an_adapter_at_zero_gives_exactly_nothing(scale: float, tmp_path: Path):
    """At any guidance, as both scores have it; DMD's, on the teacher alone, would not be zero."""
    made = lora(
        tmp_path,
        tiny_stable_diffusion(),
        perturbed=False,
        **{"method": "swiftbrush", "guidance_scale": scale, "fake_guidance_scale": scale},
    )
    batch = prompts_of(made.student.denoiser, PROMPTS * 2)
    x0, eps = (randn((4, *batch.shape), generators(range(i, i + 4))) for i in (0, 10))
    assert on_the_sample(made, batch, x0, torch.tensor([0.1, 0.35, 0.6, 0.9]), eps).abs().max() == 0


def test_prompts_are_emptied_for_the_fake_score_alone(tmp_path: Path):
    """A share of 0.3 of 200 rows (a deviation of 0.03); the student's loss and sample keep their prompts."""
    made = method(
        tmp_path, Teacher(PROCESSES["flow"], [0.0], [1.0], side=1), method="swiftbrush", fake_score_prompt_dropout=0.3
    )
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 200)
    draws = made.draw(batch, Rngs(0, 0, range(200)), 0, ["student", "fake_score"])
    empty = (draws.conditions["fake_score"].tensors["shift"] == 0).float().mean()
    assert abs(empty - 0.3) < 0.1
    assert (draws.conditions["student"].tensors["shift"] == SHIFT).all()
    # the noise, shared by both, made the sample with its prompt: x0 of the teacher shifted by all of SHIFT or not at all
    plain = method(tmp_path, Teacher(PROCESSES["flow"], [0.0], [1.0], side=1), method="swiftbrush", prompt_dropout=0.0)
    assert torch.equal(plain.rollout(batch, Rngs(0, 0, range(200)), False), draws.x0)


def test_prompts_are_emptied_before_the_student_samples(tmp_path: Path):
    """A share of 0.3 of 200 rows, the same ones for the sample, the student's loss and the fake score's."""
    teacher = Teacher(PROCESSES["flow"], [0.0], [1.0], side=1)
    shares = {"prompt_dropout": 0.3, "fake_score_prompt_dropout": 0.0}
    made = method(tmp_path, teacher, method="swiftbrush", **shares)
    batch = prompts_of(teacher, [str(SHIFT)] * 200)
    draws = made.draw(batch, Rngs(0, 0, range(200)), 0, ["student", "fake_score"])
    shift = draws.conditions["student"].tensors["shift"]
    assert abs((shift == 0).float().mean() - 0.3) < 0.1
    assert torch.equal(draws.conditions["fake_score"].tensors["shift"], shift)
    told = prompts_of(teacher, [str(v) for v in shift.tolist()])
    assert torch.equal(made.rollout(told, Rngs(0, 0, range(200)), False), draws.x0)


def test_the_weight_on_epsilon(tmp_path: Path):
    """alpha^2 |eps - eps*|^2 of every VP: alpha^4 on the error of v, alpha^2 on epsilon's; `epsilon` is without alpha^2."""
    for name, power in (("vp_v_zero_snr", 2), ("vp", 0)):
        found = {}
        for weight in ("output", "epsilon", None):  # SwiftBrush's own is alpha_epsilon
            changes = {"fake_score_weight": weight} if weight else {}
            made = exact(tmp_path, name, Laws(), method="swiftbrush", **changes)
            batch, x0, t, eps = rows(made, Laws())
            assert batch.condition is not None
            found[weight] = made.denoising(x0, t, eps, batch.condition, None)
        alpha, _ = made.noise.levels(t, x0)
        assert found["output"].min() > 1e-6
        assert torch.allclose(found["epsilon"], alpha**power * found["output"], rtol=1e-12)
        assert torch.allclose(found[None], alpha ** (power + 2) * found["output"], rtol=1e-12)
