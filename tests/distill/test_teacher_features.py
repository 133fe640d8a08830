"""A discriminator on the frozen teacher's features: what its gradients are and reach, which calls it costs, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Batch
from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.networks import Networks
from fewstep.distill.objectives.policy import Draws
from fewstep.distill.random import Rngs
from fewstep.distill.run import methods_distiller
from fewstep.samplers.adapters import bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.exact import prompts_of
from tests.distill.gaussian import calls, is_as_declared, lora, under_training
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion

OF_TEACHER: dict[str, Any] = {
    **{"method": "dmd2", "steps": [1], "guidance_scale": 1.0, "train_batch_size": 2, "max_grad_norm": 1e9},
    **{
        "gan_weight": 0.5,
        "train_data": "in memory",
        "discriminator_features": "teacher",
        "feature_blocks": ["mid_block"],
    },
}
KINDS = ("lora", "full")


def made_of(folder: Path, kind: str, **changes: Any) -> tuple[DistributionMatching, Batch]:
    """Roles that are all different: student and fake score have left the teacher."""
    settings = OF_TEACHER | changes
    if kind == "lora":
        made = lora(folder, tiny_stable_diffusion(), **settings)
    else:
        networks = Networks(denoiser_of(tiny_stable_diffusion()), "full")
        made = methods_distiller(config(folder, student="full", **settings), networks)
        assert isinstance(made, DistributionMatching)
        for role in (made.roles()[name] for name in ("student", "fake_score")):
            with torch.no_grad():
                role.parameters["unet.mid_block.resnets.0.conv1.weight"].mul_(4)
    batch = prompts_of(made.student.denoiser, PROMPTS)
    batch.x0 = randn((2, *batch.shape), generators([7, 8]))
    return made, batch


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    """The teacher as it was before any role was made."""
    return denoiser_of(tiny_stable_diffusion())


def opened(made: DistributionMatching) -> Iterator[nn.Parameter]:
    """Every parameter of every network and module, each of which would take a gradient."""
    roles = made.roles().values()
    modules = (
        *(bare(n) for r in roles for n in r.denoiser.networks.values()),
        *(m for r in roles for m in r.modules.values()),
    )
    for p in chain.from_iterable(m.parameters() for m in modules):
        p.requires_grad_(True)
        p.grad = None
        yield p


def draws_of(made: DistributionMatching, batch: Batch) -> Draws:
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    draws.x0 = draws.x0.detach().requires_grad_()
    return draws


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_gradient_is_autograds_through_the_teacher(kind: str, teacher: Denoiser, tmp_path: Path):
    """gan_weight d/dx0 of the batch's mean softplus(-logit), on x0 alone: no weight of any network or head gets one."""
    made, batch = made_of(tmp_path, kind, gan_warmup_steps=1)
    assert made.discriminator is not None
    heads, condition = made.discriminator.heads, batch.condition
    assert heads is not None
    assert condition is not None
    draws, found = draws_of(made, batch), []
    for iteration in (1, 0):  # the second: in the GAN's warm-up, without it
        parameters = list(opened(made))
        (losses,) = made.loss("student", batch, draws, iteration)
        (gradient,) = torch.autograd.grad(losses.total, draws.x0)
        found.append(gradient)
        assert all(p.grad is None for p in parameters)
    x0, at = draws.x0.detach().requires_grad_(), (draws.eps["student gan"], draws.t["student gan"])
    wanted = []
    for read in (teacher, made.fake_score.denoiser):
        features = read.features(made.noise.add(x0, *at), at[1], condition, ["mid_block"])
        wanted.append(torch.autograd.grad(0.5 * softplus(-heads(features)).mean(), x0)[0])
    assert torch.allclose(found[0] - found[1], wanted[0], rtol=1e-3, atol=1e-4 * float(wanted[0].abs().max()))
    assert not torch.allclose(wanted[0], wanted[1], rtol=0.02, atol=0.02 * float(wanted[0].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_loss_trains_the_heads_alone(kind: str, teacher: Denoiser, tmp_path: Path):
    """As autograd has it on the features of the teacher as it was, fakes and real ones in one call without graph."""
    made, batch = made_of(tmp_path, kind, discriminator_weight=0.3)
    assert made.discriminator is not None
    heads, condition = made.discriminator.heads, batch.condition
    assert heads is not None
    assert condition is not None
    assert batch.x0 is not None
    draws = draws_of(made, batch)
    own = {id(p) for p in heads.parameters()}
    others = [p for p in opened(made) if id(p) not in own]
    with calls(made) as seen:
        _, gan = made.loss("fake_score", batch, draws, 0)
    gan.total.backward()
    assert [(c.role, c.rows, c.graph, c.stopped) for c in seen] == [
        ("fake_score", 2, True, False),
        ("teacher", 4, False, True),
    ]
    assert all(p.grad is None for p in others)
    found = [p.grad for p in heads.parameters()]
    logits = []
    for x, name in ((draws.x0.detach(), "fake gan"), (batch.x0, "real gan")):
        x_t = made.noise.add(x, draws.eps[name], draws.t[name])
        logits.append(heads(teacher.features(x_t, draws.t[name], condition, ["mid_block"])))
    loss = 0.3 * (softplus(logits[0]) + softplus(-logits[1])).mean()
    for one, wanted in zip(found, torch.autograd.grad(loss, list(heads.parameters())), strict=True):
        assert one is not None
        assert torch.allclose(one, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_fake_score_is_trained_as_without_a_discriminator(tmp_path: Path):
    """Bit for bit, in three iterations of its own, while the heads move; that on its own features bends it."""
    found, moved = {}, 0.0
    for name, changes in (
        ("teacher", {}),
        ("own", {"discriminator_features": "fake_score"}),
        ("none", {"gan_weight": 0.0}),
    ):
        made, batch = made_of(tmp_path, "lora", name=name, fake_score_warmup_steps=3, **changes)
        before = {k: p.detach().clone() for k, p in made.fake_score.parameters.items()}
        trainer = under_training(tmp_path, made, made.student.denoiser, PROMPTS, batch.x0)
        for i in range(3):
            trainer.step(i)
        found[name] = {k: p for k, p in made.fake_score.parameters.items() if not k.startswith("discriminator.")}
        if name == "teacher":
            heads = [k for k in before if k.startswith("discriminator.")]
            moved = min((made.fake_score.parameters[k] - before[k]).abs().max().item() for k in heads)
    assert moved > 1e-3
    assert all(torch.equal(p, found["none"][k]) for k, p in found["teacher"].items())
    assert not all(torch.equal(p, found["none"][k]) for k, p in found["own"].items())


COSTS: list[dict[str, Any]] = [
    {"guidance_scale": 3.0},
    {"method": "tdm", "steps": [2]},
    {"method": "sid", "discriminator": "heads"},
    {"method": "uni_instruct", "divergence": "f_distill", "discriminator": "heads", "gan_weight": 0.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", COSTS, ids=lambda c: "-".join(map(str, c.values())))
def test_cost_is_as_declared(changes: dict[str, Any], kind: str, tmp_path: Path):
    """The discriminator asks the teacher alone: a row of the sample, with a graph to it for a GAN, and two without."""
    rhythm = {"fake_score_updates": 2, "fake_score_warmup_steps": 0, "gan_warmup_steps": 0}
    made, batch = made_of(tmp_path, kind, **(rhythm | changes))
    trainer = under_training(tmp_path, made, made.student.denoiser, PROMPTS, batch.x0)
    graph = made.config.gan_weight > 0
    for i in range(2):
        with calls(made) as seen:
            trainer.step(i)
        is_as_declared(made, i, seen)
        looks = [("teacher", 2, graph)] if i == 0 else []
        assert [(c.role, c.rows, c.graph) for c in seen if c.stopped] == [*looks, ("teacher", 4, False)]


def test_the_teacher_is_told_the_prompt(tmp_path: Path):
    """Also where the fake score never is, and never the number of a step, which is an input of the fake score's."""
    made, batch = made_of(tmp_path, "lora", fake_train_guidance_scale=0.0)
    assert batch.condition is not None
    assert made.told(batch.condition) == batch.condition
    steps = {"method": "tdm", "steps": [2], "step_conditioned": True}
    made, batch = made_of(tmp_path, "full", **steps)
    assert batch.condition is not None
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    point = draws.point
    assert point is not None
    assert point.number is not None
    assert made.told_fake(batch.condition, point).guidance is not None
    assert made.told(batch.condition, point).guidance is None


def test_logits_without_weights_are_refused(tmp_path: Path):
    said = "discriminator_features: discriminator mean has no weights of its own"
    for method in ("dmd2", "uni_instruct"):  # whose default it is
        mean = {"discriminator": "mean"} if method == "dmd2" else {}
        with pytest.raises(ConfigError, match=said):
            config(tmp_path, **(OF_TEACHER | {"method": method} | mean))
