"""Ordinary training: the weight of each prediction type, the exact denoiser of Gaussian data, dropout, the text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distill.distiller import Batch
from fewstep.distill.methods.pretrain import Draws, Pretrain
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.levels import training_level
from fewstep.distill.random import Rngs
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.noise import EDM, Discrete, Flow
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.closed_form import GaussianTeacher, posterior, processes
from tests.distill.gaussian import PROCESSES, Teacher, calls, method, under_training
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_ddpm, tiny_stable_diffusion

LEVELS = torch.tensor([0.02, 0.2, 0.5, 0.7, 0.9, 1.0])


def pretrain(folder: Path, pipeline: Any, **changes: Any) -> Pretrain:
    """On a tiny pipeline."""
    settings = config(folder, **({"student": "full", "negative_prompt": "blurry"} | changes))
    networks = Networks(denoiser_of(pipeline), settings.student, rank=4)
    return Pretrain(settings, networks)  # type: ignore[arg-type]


# the weight


@pytest.mark.parametrize("name", processes())
def test_min_snr_is_one_loss_for_every_prediction_type(name: str, tmp_path: Path):
    """Weighted on its own output, each network's loss is min(SNR, 5) |x0_hat - x0|^2, whatever it predicts.

    A vector of times from SNR = 2,500 to 0; the network is wrong by an arbitrary affine function.
    """
    teacher = GaussianTeacher(processes()[name], mean=0.7, std=0.5, shape=(2, 4, 4))
    settings = config(tmp_path, student="full", snr_gamma=5.0)
    made = Pretrain(settings, Networks(teacher, "full"))  # type: ignore[arg-type]
    with torch.no_grad():
        made.student.denoiser.network.scale += 0.3
        made.student.denoiser.network.offset -= 0.2
    x0, eps = (randn((6, 2, 4, 4), generators(range(i, i + 6))) for i in (0, 6))
    condition = teacher.encode(["0"] * 6)
    (losses,) = made.loss("student", Batch([""] * 6, (2, 4, 4), condition, x0), Draws(LEVELS, eps, condition), 0)
    x_t = made.noise.add(x0, eps, LEVELS)
    error = (made.student.denoiser.x0(x_t, LEVELS, condition) - x0).square().mean((1, 2, 3))
    snr = (made.noise.alpha(LEVELS) / made.noise.sigma(LEVELS)) ** 2
    wanted = (snr.clamp(max=5.0) * error).mean()
    assert losses.total.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_levels_are_uniform_or_have_a_normal_logit(tmp_path: Path):
    """Kolmogorov-Smirnov distance of 4,000 draws to the law that the config names."""
    from scipy.stats import kstest

    for changes, law in (
        ({}, lambda t: kstest(t, "uniform")),
        (
            {"weighting_scheme": "logit_normal", "logit_mean": -0.2, "logit_std": 1.2},
            lambda t: kstest(t.logit(), "norm", (-0.2, 1.2)),
        ),
    ):
        t = training_level(config(tmp_path, student="full", **changes), Rngs(0, 0, range(4000)))  # type: ignore[arg-type]
        assert ((t > 0) & (t <= 1)).all()
        assert law(t.double()).pvalue > 0.01


def test_min_snr_of_epsilon_in_the_papers_form(tmp_path: Path):
    """min(SNR, gamma) / SNR on epsilon, / (SNR + 1) on v (arXiv:2303.09556, section 3.4), at alpha = 0.8 and 0.6."""
    table = torch.tensor([0.64, 0.36])  # SNR 16/9 and 9/16
    for kind, expected in (("epsilon", [9 / 16, 1.0]), ("v_prediction", [9 / 25, 9 / 25])):
        teacher = GaussianTeacher(Discrete(table, kind))
        made = Pretrain(config(tmp_path, student="full", snr_gamma=1.0), Networks(teacher, "full"))  # type: ignore[arg-type]
        assert made.weight(torch.tensor([0.5, 1.0])).tolist() == pytest.approx(expected)


# convergence


@pytest.mark.parametrize(
    ("name", "gamma"), [("vp", 5.0), ("vp", None), ("vp_v_zero_snr", 5.0), ("flow_shifted", None), ("edm", 5.0)]
)
def test_a_trained_network_is_the_exact_denoiser(name: str, gamma: float | None, tmp_path: Path):
    """From N(0, 1) to data N(mu, S^2) by Trainer: E[x0 | x_t] within 8% of S, two deviations of x_t to either side.

    Least squares over an affine network knows no more of the data than its mean and deviation, so those of the
    64 samples are made exact. What is left is the walk of the optimiser, up to 5% where an epsilon is divided by a
    small alpha and where EDM's corrections at high noise are hardly used.
    """
    mean, std = (torch.tensor(v).reshape(2, 1, 1) for v in ([1.2, -0.4], [0.5, 1.6]))
    x0 = randn((64, 2, 8, 8), generators(range(64)))
    x0 = mean + std * (x0 - x0.mean((0, 2, 3), keepdim=True)) / x0.std((0, 2, 3), correction=0, keepdim=True)
    teacher = Teacher(PROCESSES[name], [0.0, 0.0], [1.0, 1.0])
    settings = {
        **{"method": "pretrain", "snr_gamma": gamma, "train_batch_size": 16, "max_train_steps": 600},
        **{"learning_rate": 0.03, "lr_scheduler": "cosine", "adam_beta2": 0.99},
        **{"logging_steps": 1000, "checkpointing_steps": 1000, "prompt_dropout": 0.0},
    }
    made = method(tmp_path, teacher, **settings)
    under_training(tmp_path, made, teacher, [""] * 64, x0).run()
    student = made.roles()["student"].denoiser
    t = student.noise.shift(torch.tensor([0.3, 0.6, 0.9]))
    alpha, sigma = student.noise.levels(t, torch.zeros(3, 2, 1, 1))
    for z in (-2.0, 0.0, 2.0):
        x_t = (alpha * mean + z * (alpha**2 * std**2 + sigma**2).sqrt()).expand(3, 2, 8, 8)
        with torch.no_grad():
            found = student.x0(x_t, t, student.encode([""] * 3))
        wanted, _ = posterior(student.noise, x_t, t, mean, std)
        assert ((found - wanted).abs() / std).max() < 0.08


# dropout


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_dropped_rows_have_the_negative_prompt(train_text_encoder: bool, tmp_path: Path):
    """Where the uniform draw is below prompt_dropout; elsewhere the row's own prompt. Cached or encoded, the same."""
    changes = {"prompt_dropout": 0.4, "train_text_encoder": train_text_encoder}
    made = pretrain(tmp_path, tiny_stable_diffusion(), **changes)
    denoiser, n = made.student.denoiser, 24
    prompts = [PROMPTS[i % 2] for i in range(n)]
    with torch.no_grad():
        own, negative = (
            denoiser.encode(p, "blurry").tensors["encoder_hidden_states"] for p in (prompts, ["blurry"] * n)
        )
        condition = None if train_text_encoder else denoiser.encode(prompts, "blurry")
    rng = Rngs(0, 0, range(n))
    batch = Batch(prompts, denoiser.latent_shape(), condition, torch.zeros(n, *denoiser.latent_shape()))
    draws = made.draw(batch, rng, 0, ["student"])
    dropped = rng.uniform("dropout") < 0.4
    assert 4 < dropped.sum() < 16  # 9.6 expected, a deviation of 2.4
    wanted = torch.where(dropped.reshape(-1, 1, 1), negative, own)
    assert torch.allclose(draws.condition.tensors["encoder_hidden_states"], wanted, atol=1e-5)
    assert (own - negative).abs().amax((1, 2)).min() > 0.1


def test_levels_cover_all_but_the_clean_one(tmp_path: Path):
    """Uniform in (0, 1] before a flow's shift."""
    teacher = Teacher(Flow(3.0), [0.0], [1.0], side=1)
    made = method(tmp_path, teacher, method="pretrain")
    batch = Batch([""] * 1000, (1, 1, 1), teacher.encode([""] * 1000), torch.zeros(1000, 1, 1, 1))
    u = made.noise.unshift(made.draw(batch, Rngs(0, 0, range(1000)), 0, ["student"]).t)  # type: ignore[attr-defined]
    assert u.min() > 0
    # the distance of Kolmogorov and Smirnov exceeds 1.95 / sqrt(n) with a probability of 0.1%
    assert (u.sort().values - torch.linspace(0, 1, 1000)).abs().max() < 1.95 / 1000**0.5


# the text encoder


def test_the_text_encoder_is_trained_through_the_prompts(tmp_path: Path):
    """Gradients reach it, the optimiser moves it with the network, and it is saved as the student's; in float32."""
    pipeline = tiny_stable_diffusion()
    pipeline.text_encoder.half()  # as transformers loads a file of half precision
    made = pretrain(tmp_path, pipeline, train_text_encoder=True, train_batch_size=2)
    encoder = {k: p for k, p in made.student.parameters.items() if k.startswith("text_encoder.")}
    assert {k.removeprefix("text_encoder.") for k in encoder} == dict(pipeline.text_encoder.named_parameters()).keys()
    assert {p.dtype for p in encoder.values()} == {torch.float32}
    before = {k: p.detach().clone() for k, p in made.student.parameters.items()}
    x0 = randn((2, *made.student.denoiser.latent_shape()), generators([0, 1]))
    trainer = under_training(tmp_path, made, made.student.denoiser, PROMPTS, x0)
    trainer.batches.condition = None  # as `train` leaves it where the method encodes
    trainer.batches.data.captions = list(PROMPTS)
    trainer.step(0)
    moved = {k for k, p in made.student.parameters.items() if not torch.equal(before[k], p)}
    # the tables of tokens and of places that no prompt has used are rows, not tensors: all tensors move
    assert {k for k in moved if k in encoder} == encoder.keys()
    assert any(k.startswith("unet.") for k in moved)


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (tiny_ddpm, {}, "DDPMPipeline has no text encoder"),
        (tiny_stable_diffusion, {"student": "lora"}, "set student: full"),
    ],
    ids=["ddpm", "lora"],
)
def test_a_text_encoder_that_cannot_be_trained_is_refused(build: Any, changes: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        pretrain(tmp_path, build(), train_text_encoder=True, **changes)


# cost, plan


def test_cost_is_as_declared(tmp_path: Path):
    teacher = Teacher(Flow(), [0.0], [1.0])
    made = method(tmp_path, teacher, method="pretrain")
    trainer = under_training(tmp_path, made, teacher, [""] * 4)
    with calls(made) as seen:
        trainer.step(0)
    assert [(c.rows / 4, len(c.backward)) for c in seen] == [(1, 1)]
    assert made.forwards() == {"student": {"forward": 0, "backward": 1}}


def test_the_plan_is_the_guided_ode(tmp_path: Path):
    teacher = Teacher(EDM(sigma_max=5.0), [0.0], [1.0])
    made = method(tmp_path, teacher, method="pretrain", step_counts=[20], validation_guidance_scale=3.0)
    plan = made.plan(20)
    assert (plan.rule, plan.initial_scale, len(plan.steps), plan.nfe) == ("ode", 5, 20, 40)
    with pytest.raises(UserError, match="steps 50"):
        made.plan(50)
