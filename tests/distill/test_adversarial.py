"""The GAN regulariser: its losses and heads by numbers, what it adds to the student's direction, what each loss reaches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.buckets import make_buckets
from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Batch, Pairs
from fewstep.distill.methods.distribution_matching import DistributionMatching, Draws
from fewstep.distill.networks import require_grad
from fewstep.distill.objectives import adversarial
from fewstep.distill.objectives.policy import Point
from fewstep.distill.random import Rngs
from fewstep.distill.run import refuse
from fewstep.samplers.condition import Condition
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.exact import SHIFT, Laws, exact, on_the_sample, prompts_of, rows
from tests.distill.gaussian import calls, is_as_declared, lora, under_training
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion, tiny_stable_diffusion_3

KINDS = ("heads", "mean")
GAN: dict[str, Any] = {"method": "dmd2", "steps": [1], "gan_weight": 0.5, "train_data": "in memory"}


def test_losses():
    """-log sigmoid(l) and -log(1 - sigmoid(l)): log 2 at 0, log(4/3) and log 4 at log 3, means over a sample's logits."""
    three = math.log(3)
    fake, real = torch.tensor([[0.0, three], [0.0, 0.0]]), torch.tensor([[three, three], [0.0, 0.0]])
    two = math.log(2)
    assert adversarial.generator_loss(fake).tolist() == pytest.approx([(two + math.log(4 / 3)) / 2, two])
    wanted = [(two + math.log(4)) / 2 + math.log(4 / 3), 2 * two]
    assert adversarial.discriminator_loss(fake, real).tolist() == pytest.approx(wanted)


def test_the_optimal_discriminator_says_the_log_ratio():
    """Over points with masses p and q the discriminator's loss is least at log p/q: no gradient there, one beside it."""
    p, q = (torch.tensor(v).double() for v in ([0.5, 0.3, 0.2], [0.1, 0.6, 0.3]))
    for off, small in ((0.0, True), (0.1, False)):
        logit = ((p / q).log() + off).requires_grad_()
        column = logit[:, None]
        loss = (q * adversarial.discriminator_loss(column, torch.full_like(column, 50.0))).sum()
        loss = loss + (p * adversarial.discriminator_loss(torch.full_like(column, -50.0), column)).sum()
        (gradient,) = torch.autograd.grad(loss, logit)
        assert bool(gradient.abs().max() < 1e-12) is small


def test_direction():
    """Logit k.x: N times the gradient of softplus(-k.x) is -N k sigmoid(-k.x); beyond the bound there is none."""
    k = torch.tensor([2.0, -1.0])
    x = torch.tensor([[0.3, 0.4], [9.0, -9.0]])
    d, logits = adversarial.direction(x, lambda x: (x * k).sum(1, keepdim=True), bound=10.0)
    assert logits.flatten().tolist() == pytest.approx([0.2, 27])
    assert torch.allclose(d[0], -2 * k * torch.tensor(-0.2).sigmoid())
    assert d[1].abs().max() == 0


def test_half_precision_keeps_the_direction():
    """Of a mean over very many features each one's share is below what float16 holds, unless the loss is scaled; by all of a
    clip's N it would overflow where a head makes one logit of a map.
    """
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, x[0].numel()).reshape(x[0].shape)

    def logits(x: Tensor) -> Tensor:  # 2^16 features in half precision, and their mean
        features = (x * weight).half().repeat(1, 4, 1, 1)
        return features.flatten(1).float().mean(1, keepdim=True) + 4

    found, said = adversarial.direction(x, logits)
    wanted = -(-said).sigmoid().reshape(-1, 1, 1, 1) * weight
    assert torch.allclose(found, wanted, rtol=2e-3, atol=1e-7)
    x = torch.randn(1, 4, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    found, _ = adversarial.direction(x, lambda x: x.half().flatten(1).mean(1, keepdim=True).float() - 9)
    assert torch.allclose(found, torch.tensor(-9.0).neg().sigmoid().neg().expand_as(found), rtol=2e-3)


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (1, 16, 4, 4), (2, 8, 2, 2), (2, 6, 9, 16), (2, 5, 8), (2, 64, 3, 3)])
def test_heads(shape: tuple[int, ...]):
    """One logit a sample and map that depends on every position of it, with weights that depend on the seed alone."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    heads = adversarial.Heads([x, x], seed=3)
    logits = heads([x, x])
    assert logits.shape == (shape[0], 2)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    places = gradient.abs().sum(1 if len(shape) == 4 else 2)
    # strided convolutions of an odd side leave its last row out
    assert (places > 0).float().mean() > 0.7
    torch.rand(3)
    again = adversarial.Heads([x, x], seed=3)
    assert torch.equal(again([x, x]), logits)
    assert not torch.equal(adversarial.Heads([x, x], seed=4)([x, x]), logits)


@pytest.mark.parametrize(("model", "scale"), [((512, 512), 64), ((1024, 1024), 32)])
def test_heads_take_maps_of_every_bucket(model: tuple[int, int], scale: int):
    """Of SD 1.5's and SDXL's mid blocks, made for the square; one as large as the example is not padded."""
    heads = adversarial.Heads([torch.zeros(1, 8, model[0] // scale, model[1] // scale)])
    for height, width in make_buckets(*model, 64):
        x = torch.randn(2, 8, height // scale, width // scale, generator=torch.Generator().manual_seed(0))
        logits = heads([x.requires_grad_()])
        assert logits.shape == (2, 1)
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        assert (gradient.abs().sum(1) > 0).float().mean() > 0.7
    x = torch.randn(1, 8, model[0] // scale, model[1] // scale)
    assert adversarial._at_least(x, x.shape[2:]) is x


def test_mean_logits():
    """A map's mean over channels, at each place; tokens' mean over themselves, of each channel."""
    image = torch.arange(16.0).reshape(1, 2, 2, 4)
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    logits = adversarial.mean_logits([image, tokens])
    assert logits.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11, 2, 4]]


# in the method


def made_of(folder: Path, kind: str, **changes: Any) -> tuple[DistributionMatching, Batch]:
    made = lora(folder, tiny_stable_diffusion(), **(GAN | {"discriminator": kind} | changes))
    batch = prompts_of(made.student.denoiser, PROMPTS)
    batch.x0 = randn((2, *batch.shape), generators([7, 8]))
    return made, batch


@pytest.mark.parametrize("weight", ["none", "mean_gap"])
def test_what_it_adds_to_the_students_direction(weight: str, tmp_path: Path):
    """With logit k x_t of the sample alone: -gan_weight N k alpha sigmoid(-k x_t), N = 1, on top of the divergence's.

    `mean` looks at the divergence's own x_t, and has its weight 1 / mean |x0 - R|. Of a logit beyond 10 it adds nothing.
    """
    x, k = Laws(), 0.7
    plain = exact(tmp_path, "vp", x, method="dmd2", guidance_scale=2.0, weight=weight)
    made = exact(tmp_path, "vp", x, **(GAN | {"guidance_scale": 2.0, "weight": weight, "discriminator": "mean"}))
    made.discriminator = lambda x_t, t, condition: k * x_t.flatten(1)  # type: ignore[assignment]
    batch, x0, t, eps = rows(made, x)
    assert batch.condition is not None
    added = on_the_sample(made, batch, x0, t, eps) - on_the_sample(plain, batch, x0, t, eps)
    alpha, _ = made.noise.levels(t, x0)
    x_t = made.noise.add(x0, eps, t)
    wanted = -0.5 * k * alpha * (-k * x_t).sigmoid()
    if weight == "mean_gap":
        r = made.teacher.denoiser.guided_x0(x_t, t, batch.condition, 2.0)
        wanted = wanted / (x0 - r).abs().clamp(min=1e-3)
    assert torch.allclose(added, wanted, rtol=1e-6, atol=1e-12)
    assert x_t.min() < -0.01 < 0.01 < x_t.abs().min()
    made.discriminator = lambda x_t, t, condition: 1000 * x_t.flatten(1)  # type: ignore[assignment]
    assert torch.equal(on_the_sample(made, batch, x0, t, eps), on_the_sample(plain, batch, x0, t, eps))


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_reaches_its_own_role_alone(kind: str, tmp_path: Path):
    """The student's GAN goes through features and heads without touching them; the fake score's reaches both."""
    made, batch = made_of(tmp_path, kind)
    owned = {k for k in made.fake_score.parameters if k.startswith("discriminator.")}
    assert bool(owned) is (kind == "heads")
    require_grad(made.roles(), ["student", "fake_score"])
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    for losses in made.loss("student", batch, draws, 0):
        losses.total.backward()
    reached = {n: sum(p.grad is not None for p in r.parameters.values()) for n, r in made.roles().items()}
    assert reached["student"] > 0
    assert reached["fake_score"] == 0
    for p in made.student.parameters.values():
        p.grad = None
    _, gan = made.loss("fake_score", batch, draws, 0)
    gan.total.backward()
    parameters = made.fake_score.parameters
    assert all(parameters[k].grad is not None for k in owned)
    assert any(p.grad is not None and p.grad.any() for k, p in parameters.items() if k not in owned)
    assert all(p.grad is None for p in made.student.parameters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_levels_and_noises(kind: str, tmp_path: Path):
    """Heads look at levels and noises of their own, of fakes and of real ones; `mean` at the role's, the same for both."""
    made, batch = made_of(tmp_path, kind)
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    with calls(made) as seen:
        for role in ("student", "fake_score"):
            list(made.loss(role, batch, draws, 0))
    looks = [c for c in seen if c.stopped]
    assert [(c.role, c.rows, c.graph) for c in looks] == [("fake_score", 2, True), ("fake_score", 4, True)]
    names = ("student gan", "fake gan", "real gan") if kind == "heads" else ("student", "fake_score", "fake_score")
    found = [draws.x0.detach(), draws.x0.detach(), batch.x0]
    wanted = [made.noise.add(x, draws.eps[n], draws.t[n]) for x, n in zip(found, names, strict=True)]
    assert torch.equal(torch.cat([c.x_t for c in looks]), torch.cat(wanted))
    assert len({round(v, 6) for n in draws.t for v in draws.t[n].tolist()}) == 2 * len(draws.t)
    # a fake score that never sees the prompt tells real from fake without it
    zero, _ = made_of(tmp_path, kind, fake_train_guidance_scale=0.0)
    asked, told = zero.discriminator, list[Condition]()
    assert asked is not None
    zero.discriminator = lambda x_t, t, c: told.append(c) or asked(x_t, t, c)  # type: ignore[assignment]
    for role in ("student", "fake_score"):
        list(zero.loss(role, batch, draws, 0))
    assert [c.size for c in told] == [2, 4]
    for c in told:
        assert all(torch.equal(c.tensors[k], v.expand_as(c.tensors[k])) for k, v in c.negative.items())


@pytest.mark.parametrize("kind", KINDS)
def test_levels_and_noises_of_samples_that_keep_noise(kind: str, tmp_path: Path):
    """Fakes are noised on from where their step ended, to levels of the step; real ones from clean, to such levels, too."""
    made, batch = made_of(tmp_path, kind, method="tdm", steps=[4])
    below = 0
    for i in range(4):
        draws = made.draw(batch, Rngs(0, i, range(2)), i, ["student", "fake_score"])
        with calls(made) as seen:
            for role in ("student", "fake_score"):
                list(made.loss(role, batch, draws, 0))
        names = ("student gan", "fake gan", "real gan") if kind == "heads" else ("student", "fake_score", "fake_score")
        at = draws.point
        assert at is not None
        below += int((at.to > 0).sum())
        for name in names:
            assert ((draws.t[name] > at.to) & (draws.t[name] <= at.start)).all()
        wanted = [made.noise.renoise(at.x, draws.eps[n], at.s, draws.t[n]) for n in names[:2]]
        wanted.append(made.noise.add(batch.x0, draws.eps[names[2]], draws.t[names[2]]))
        assert torch.allclose(torch.cat([c.x_t for c in seen if c.stopped]), torch.cat(wanted), atol=1e-6)
    assert below > 0


def test_what_it_adds_where_a_step_ends(tmp_path: Path):
    """With logit k x_t and x_t = a x_s + b xi: -gan_weight N k a sigmoid(-k x_t) on the sample, N = 1, at the point."""
    x, k = Laws(), 0.7
    settings = {"method": "tdm", "steps": [2], "divergence": "reverse_kl", "weight": "none", "guidance_scale": 2.0}
    plain = exact(tmp_path, "vp", x, **settings)
    made = exact(tmp_path, "vp", x, **(GAN | settings | {"discriminator": "mean"}))
    made.discriminator = lambda x_t, t, condition: k * x_t.flatten(1)  # type: ignore[assignment]
    batch, x0, t, eps = rows(made, x)
    t = 0.5 + t / 2
    start, to = (torch.full_like(t, v) for v in (1.0, 0.5))
    s = made.noise.shift(to)
    at = Point(0.8 * x0 + 0.1, x0, start, to, s)
    found = []
    for method in (made, plain):
        sample = x0.clone().requires_grad_()
        draws = Draws(sample, t={"student": t}, eps={"student": eps}, point=at)
        (losses,) = method.loss("student", batch, draws, 0)
        losses.total.backward()
        assert sample.grad is not None
        found.append(sample.grad * sample.numel())
    a, b = made.noise.kernel(s, t, x0)
    wanted = -0.5 * k * a * (-k * (a * at.x + b * eps)).sigmoid()
    assert torch.allclose(found[0] - found[1], wanted, rtol=1e-6, atol=1e-12)
    assert wanted.abs().max() > 0.01


COSTS: list[dict[str, Any]] = [
    {"discriminator": "heads"},
    {"method": "tdm", "discriminator": "heads", "steps": [2]},
    {"method": "tdm", "discriminator": "mean", "steps": [2]},
    {"discriminator": "mean", "fake_train_guidance_scale": 0.0},
    {"method": "uni_instruct", "discriminator": "mean", "exact_divergence": True},
    {"method": "uni_instruct", "divergence": "f_distill", "discriminator": "heads", "gan_weight": 0.0},
]


@pytest.mark.parametrize("changes", COSTS, ids=lambda c: "-".join(map(str, c.values())))
def test_cost_is_as_declared(changes: dict[str, Any], tmp_path: Path):
    """A call that stops at the deepest block counts as one: one of the student's sample, two of fakes and real ones.

    Without a GAN in the student's loss an f-divergence asks for the ratio alone, and that without graph.
    """
    rhythm = {"fake_score_updates": 2, "train_batch_size": 2, "fake_score_warmup_steps": 0, "gan_warmup_steps": 0}
    made = lora(tmp_path, tiny_stable_diffusion(), **(GAN | rhythm | changes))
    x0 = randn((2, *made.student.denoiser.latent_shape()), generators([7, 8]))
    trainer = under_training(tmp_path, made, made.student.denoiser, PROMPTS, x0)
    for i in range(2):
        with calls(made) as seen:
            trainer.step(i)
        is_as_declared(made, i, seen)


@pytest.mark.parametrize("pairs_alone", [0, 2])
def test_the_students_turn_waits_for_the_warm_up(pairs_alone: int, tmp_path: Path):
    """Before `gan_warmup_steps` the student's loss is as without, while the discriminator learns; after those of pairs alone."""
    pairs = {"method": "dmd", "regression_metric": "squared", "regression_warmup_steps": pairs_alone}
    made, batch = made_of(tmp_path, "heads", gan_warmup_steps=3, **(pairs if pairs_alone else {}))
    assert batch.x0 is not None
    assert batch.condition is not None
    batch.pairs = Pairs(batch.x0, batch.x0, batch.condition)
    draws = made.draw(batch, Rngs(0, 0, range(2)), pairs_alone, ["student", "fake_score"])
    for iteration, there in ((pairs_alone + 2, False), (pairs_alone + 3, True)):
        student, *_ = made.loss("student", batch, draws, iteration)
        assert ("gan" in student.scalars) is there
        assert len(list(made.loss("fake_score", batch, draws, iteration))) == 2


def test_heads_on_tokens(tmp_path: Path):
    """A transformer's features are tokens; each of the family's default blocks has a head of its own, and all of it learns."""
    made = lora(tmp_path, tiny_stable_diffusion_3(), **(GAN | {"discriminator": "heads"}))
    batch = prompts_of(made.student.denoiser, PROMPTS)
    logits = made.discriminator(torch.zeros(2, *batch.shape), torch.tensor([0.5]).expand(2), batch.condition)
    logits.sum().backward()
    assert logits.shape == (2, len(made.fake_score.denoiser.feature_blocks))
    assert all(p.grad is not None and p.grad.any() for p in made.discriminator.heads.parameters())


def test_heads_are_made_for_the_size_that_is_trained(tmp_path: Path):
    """Images of 64 pixels are latents of 32 and a mid block of 16: convolutions to 8, to 4, to 1, and one for the logit."""
    made = lora(tmp_path, tiny_stable_diffusion(), **(GAN | {"height": 64, "width": 64}))
    heads = made.discriminator.heads
    assert sum(isinstance(m, torch.nn.Conv2d) for m in heads.modules()) == 4
    batch = Batch(PROMPTS, (4, 32, 32), made.student.denoiser.encode(PROMPTS))
    logits = made.discriminator(torch.zeros(2, 4, 32, 32), torch.tensor([0.5]).expand(2), batch.condition)
    assert logits.shape == (2, 1)


def test_images_are_needed(tmp_path: Path):
    refuse(config(tmp_path, **GAN))
    with pytest.raises(ConfigError, match="train_data: missing; method dmd2 learns from images"):
        refuse(config(tmp_path, **(GAN | {"train_data": None})))
    refuse(config(tmp_path, method="dmd2", prompts="embedded:emoji", train_data=None))


def test_the_exact_log_ratio_pushes_towards_the_data(tmp_path: Path):
    """Student and data of one width: log r is linear in x_t with the slope a (m + SHIFT - b) / v, and -log D falls along it."""
    x = Laws(S=0.9, c=0.9)
    made = exact(tmp_path, "flow", x, **(GAN | {"guidance_scale": 1.0, "weight": "none", "discriminator": "mean"}))
    batch, x0, t, eps = rows(made, x)

    def log_ratio(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        a, s = made.noise.levels(t, x_t)
        v = a**2 * x.S**2 + s**2
        return (((x_t - a * x.b) ** 2 - (x_t - a * (x.m + SHIFT)) ** 2) / (2 * v)).flatten(1)

    draws = Draws(x0, {"student": t}, {"student": eps})
    g, _ = made.adversarial_direction(log_ratio, x0, draws, batch.condition)  # type: ignore[arg-type]
    assert g is not None
    assert (g < 0).all()  # b is below m + SHIFT, and a step goes against the direction
