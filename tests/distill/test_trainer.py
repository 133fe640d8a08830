"""The loop: what an iteration does to the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_piecewise_constant_schedule,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Losses
from fewstep.distill.methods.pretrain import Pretrain
from fewstep.distill.networks import Networks
from fewstep.distill.random import Rngs, permutation
from fewstep.distill.trainer import Trainer
from fewstep.samplers.noise import EDM, Flow, NoiseProcess
from tests.closed_form import GaussianTeacher, vp
from tests.distill.runs import Scripted, config, metrics, scripted, square, trainer

N = 10
LATENTS = 0.7 + 0.5 * torch.randn(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def gaussian(
    settings: TrainConfig, noise: NoiseProcess | None = None, x0: Tensor = LATENTS, frozen: tuple[str, ...] = ()
) -> Trainer:
    """Pretraining from N(0, 1) on latents, under the trainer."""
    teacher = GaussianTeacher(noise or vp("v_prediction"), shape=tuple(x0.shape[1:]))
    method = Pretrain(settings, Networks(teacher, "full"))  # type: ignore[arg-type]
    for name in frozen:
        del method.student.parameters[f"network.{name}"]
    return trainer(settings, method, x0, teacher.encode([""] * len(x0)))


def weights(trained: Trainer) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in trained.roles["student"].parameters.items()}


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


SETTINGS = {
    **{"max_train_steps": 5, "train_batch_size": 4, "gradient_accumulation_steps": 3, "learning_rate": 0.02},
    **{"lr_scheduler": "cosine", "lr_warmup_steps": 2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    **{"adam_weight_decay": 0.1, "max_grad_norm": 0.05, "ema_decay": 0.9, "prompt_dropout": 0.0},
}


def bare_loop() -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The same run with torch's own parts: weights, moving average, and the norms of the gradients."""
    noise = vp("v_prediction")
    teacher = GaussianTeacher(noise, shape=LATENTS.shape[1:])
    network = teacher.network
    average = {f"network.{k}": p.detach().clone() for k, p in network.named_parameters()}
    c = SETTINGS
    rate, betas = c["learning_rate"], (c["adam_beta1"], c["adam_beta2"])
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas, c["adam_epsilon"], c["adam_weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 2) * (1 + math.cos(math.pi * i / 5)) / 2
    )
    norms = []
    for i in range(5):
        optimizer.zero_grad()
        for m in range(3):
            rows = range(4 * m, 4 * m + 4)
            places = [divmod(12 * i + r, N) for r in rows]
            x0 = LATENTS[[int(permutation(N, 0, epoch)[place]) for epoch, place in places]]
            rng = Rngs(0, i, rows)
            t, eps = 1 - rng.uniform("level"), rng.normal("noise", x0.shape[1:])
            alpha, sigma = noise.levels(t, x0)
            output = network(alpha * x0 + sigma * eps, noise.model_time(t), torch.zeros(4))
            ((output - (alpha * eps - sigma * x0)).square().mean() / 3).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), c["max_grad_norm"]).item())
        optimizer.step()
        schedule.step()
        for k, p in network.named_parameters():
            d = min(0.9, (i + 1) / (i + 10))
            average[f"network.{k}"].mul_(d).add_(p.detach(), alpha=1 - d)
    return {f"network.{k}": p.detach() for k, p in network.named_parameters()}, average, norms


def test_an_iteration_is_the_bare_loop(tmp_path: Path):
    """Accumulation, clipping, AdamW, warm-up, schedule and moving average, against torch's own parts."""
    trained = gaussian(config(tmp_path, **SETTINGS))
    trained.run()
    expected, average, norms = bare_loop()
    assert min(norms) > SETTINGS["max_grad_norm"]  # every step was clipped
    assert [line["student/grad_norm"] for line in metrics(tmp_path / "run")] == pytest.approx(norms, rel=1e-5)
    assert differ(weights(trained), expected) < 1e-6
    assert trained.average is not None
    assert differ(trained.average, average) < 1e-6
    assert differ(trained.average, weights(trained)) > 1e-3


@pytest.mark.parametrize("accumulation", [2, 3, 12])
def test_accumulation_is_a_larger_batch(tmp_path: Path, accumulation: int):
    """A micro-batches of B rows are one of A B rows: the same samples, draws, mean; float32 sums in another order."""
    runs = {}
    for a in (1, accumulation):
        settings = SETTINGS | {"gradient_accumulation_steps": a, "train_batch_size": 12 // a}
        runs[a] = gaussian(config(tmp_path, name=f"run{a}", **settings))
        runs[a].run()
    assert differ(weights(runs[1]), weights(runs[accumulation])) < 1e-5
    lines = [metrics(tmp_path / f"run{a}") for a in runs]
    for one, other in zip(*lines, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("noise", [vp("epsilon"), vp("v_prediction", True), Flow(3.0), EDM()], ids=lambda n: type(n))
def test_training_finds_the_law_of_the_data(tmp_path: Path, noise: NoiseProcess):
    """From N(0, 1) to N(0.7, 0.5^2): through Distiller, trainer and Denoiser, a vector of times in each batch.

    The data are 512 numbers with exactly this mean and variance.
    """
    x0 = torch.randn(512, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    x0 = 0.7 + 0.5 * (x0 - x0.mean()) / x0.std(unbiased=False)
    settings = {"max_train_steps": 200, "train_batch_size": 64, "learning_rate": 0.04, "lr_scheduler": "cosine"}
    settings |= {"checkpointing_steps": 200, "logging_steps": 100}
    corrections = ("scale", "offset", "tilt")  # without them the mean and the deviation are the only way
    trained = gaussian(config(tmp_path, **settings), noise, x0, frozen=corrections)
    trained.run()
    network = trained.roles["student"].denoiser.network
    assert network.mean.item() == pytest.approx(0.7, abs=0.05)
    assert network.log_std.exp().item() == pytest.approx(0.5, abs=0.05)


def test_order_of_an_iteration(tmp_path: Path):
    """Draws once per micro-batch, for the roles that step; each role steps before the next one's losses."""
    method = Scripted({"student": square, "fake_score": square}, every={"student": 2})
    run = scripted(tmp_path, method, max_train_steps=2, gradient_accumulation_steps=2, train_batch_size=1)
    run.run()
    both, alone = ("student", "fake_score"), ("fake_score",)
    told = [entry[:3] if entry[0] == "after_step" else entry for entry in method.log]
    assert told == [
        *[("draw", 0, (0,), both), ("loss", 0, "student"), ("draw", 0, (1,), both), ("loss", 0, "student")],
        ("after_step", 0, "student"),
        *[("loss", 0, "fake_score"), ("loss", 0, "fake_score"), ("after_step", 0, "fake_score")],
        *[("draw", 1, (0,), alone), ("loss", 1, "fake_score"), ("draw", 1, (1,), alone), ("loss", 1, "fake_score")],
        ("after_step", 1, "fake_score"),
    ]


def test_rates_by_rules_are_those_of_diffusers(tmp_path: Path):
    """A multiple holds until its iteration, the last one for ever; a warm-up multiplies it."""
    rules = "1:4,0.5:9,0.1"
    settings = config(tmp_path, lr_scheduler="piecewise_constant", lr_step_rules=rules)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = get_piecewise_constant_schedule(optimizer, rules)
    found = []
    for _ in range(12):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [0.3 * settings.rate(i) for i in range(12)] == pytest.approx(found)
    warm = settings.model_copy(update={"lr_warmup_steps": 8})
    assert 0.3 * warm.rate(5) == pytest.approx(found[5] * 6 / 8)


@pytest.mark.parametrize(
    ("name", "build"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_rates_that_fall_are_those_of_diffusers(name: str, build: Callable[..., LambdaLR], tmp_path: Path):
    """From 1 at first to 0 after the last iteration. Without a warm-up: diffusers' puts the fall off, ours multiplies it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    (wanted,) = build(optimizer, 0, 6).lr_lambdas
    settings = config(tmp_path, lr_scheduler=name, max_train_steps=6)
    assert [settings.rate(i) for i in range(7)] == pytest.approx([wanted(i) for i in range(7)])


def test_roles_have_their_own_rates(tmp_path: Path):
    """AdamW's first step is its rate, in every entry whose gradient is not near 0."""
    method = Scripted({"student": square, "fake_score": square})
    changes = {"method": "dmd2", "learning_rate": 0.01, "fake_score_learning_rate": 0.03}
    scripted(tmp_path, method, max_train_steps=1, **changes).run()
    moved = {name: (w.detach() - torch.tensor([1.0, 2.0])).abs() for name, w in method.weights.items()}
    torch.testing.assert_close(moved["student"], torch.full((2,), 0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved["fake_score"], torch.full((2,), 0.03), rtol=1e-4, atol=0)


def test_what_torch_draws_itself_is_of_the_iteration(tmp_path: Path):
    """Dropout, say: no state of torch's generator is carried from one iteration to the next."""
    seen: dict[str, list[float]] = {}

    def random(name: str) -> Callable[[Tensor, Tensor, int], Tensor]:
        def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
            seen.setdefault(name, []).append(torch.rand(()).item())
            return square(w, draws, iteration)

        return loss

    scripted(tmp_path / "a", Scripted({"student": random("straight")}), max_train_steps=4).run()
    torch.rand(5)
    run = scripted(tmp_path / "b", Scripted({"student": random("later")}), max_train_steps=4)
    run.iteration = 2
    run.run()
    assert seen["later"] == seen["straight"][2:]
    assert len(set(seen["straight"])) == 4


class Nested(Scripted):
    """A linear layer asked without a graph and then with one, under one autocast, as a rollout does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(2, 2)
        self.weights = {"student": self.layer.weight}
        self._roles["student"].parameters = {"w": self.layer.weight}

    def draw(self, batch: Any, rng: Any, iteration: int, roles: list[str]) -> Tensor:
        x = rng.normal("x", (2,))
        with torch.no_grad():
            x = self.layer(x)
        return self.layer(x.float())

    def loss(self, role: str, batch: Any, draws: Tensor, iteration: int) -> Any:
        assert draws.dtype == torch.bfloat16
        yield Losses(draws.float().square().mean(), {"loss": draws.detach().float().square().mean()})


def test_bf16_loses_no_gradient_after_a_call_without_graph(tmp_path: Path):
    """Older torch kept the weight's cast of the first call, which has no graph: the gradient was None."""
    method = Nested({"student": square})
    got = []
    method.layer.weight.register_hook(lambda g: got.append(g.clone()))
    scripted(tmp_path, method, mixed_precision="bf16", max_train_steps=1).run()
    w = Nested({"student": square}).layer.weight.detach().bfloat16().float().requires_grad_()
    bias = method.layer.bias.detach()
    x = Rngs(0, 0, range(4)).normal("x", (2,))
    with torch.no_grad():
        x = (x.bfloat16().float() @ w.T + bias).bfloat16().float()
    (x @ w.T + bias).square().mean().backward()
    torch.testing.assert_close(got[0], w.grad, rtol=0.02, atol=0.01)
    assert method.layer.weight.dtype == torch.float32
