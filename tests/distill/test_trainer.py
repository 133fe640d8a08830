"""The loop: what an iteration does to the weights, when it stops, and what it leaves behind."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill import checkpoint, interrupt
from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Losses
from fewstep.distill.methods.pretrain import Pretrain
from fewstep.distill.networks import Networks
from fewstep.distill.random import Rngs, permutation
from fewstep.distill.record import MAY_CHANGE
from fewstep.distill.trainer import Interrupted, Trainer
from fewstep.samplers.errors import UserError
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


def bad(kind: str, at: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A loss whose value, or whose gradient alone, is not finite in one iteration."""

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        if iteration != at:
            return square(w, draws, iteration)
        return w.sum() * math.nan if kind == "loss" else (w.sum() * 0).sqrt()

    return loss


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_number_stops_the_run(tmp_path: Path, kind: str):
    """With iteration (counted as in metrics.jsonl), role and last good checkpoint; the weights stay as they were."""
    method = Scripted({"student": square, "fake_score": bad(kind, 4)})
    run = scripted(tmp_path, method)
    before = {}
    run.method.after_step = lambda role, i, scalars: before.update({role: method.weights[role].tolist()})  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        run.run()
    assert str(caught.value) == (
        f"iteration 5: the {kind} of fake_score is not finite; "
        f"the last good checkpoint is {tmp_path / 'run/checkpoints/step-000004'}. Try a lower learning_rate"
    )
    assert method.weights["fake_score"].tolist() == before["fake_score"]
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_non_finite_number_before_any_checkpoint(tmp_path: Path):
    run = scripted(tmp_path, Scripted({"student": bad("loss", 0)}), gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"iteration 1: the loss of student .* no checkpoint was written yet"):
        run.run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_the_run_after_a_whole_iteration(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
):
    """In the middle of an accumulation: the iteration is finished, a checkpoint written, and a line says how to go on."""
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        if iteration == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as from a terminal and from a launcher
        return square(w, draws, iteration)

    run = scripted(tmp_path, Scripted({"student": loss}), gradient_accumulation_steps=2, checkpointing_steps=100)
    with pytest.raises(Interrupted) as caught:
        run.run()
    assert str(caught.value) == "stopped at iteration 3 of 6; go on with --resume"
    assert capfd.readouterr().err.splitlines() == ["stopping after this iteration; once more stops at once"]
    assert checkpoint.latest(tmp_path / "run/checkpoints")[0] == tmp_path / "run/checkpoints/step-000003"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    straight, resumed = Scripted({"student": square}), Scripted({"student": square})
    changes = {"gradient_accumulation_steps": 2, "checkpointing_steps": 100}
    scripted(tmp_path / "straight", straight, **changes).run()
    scripted(tmp_path, resumed, resume=True, **changes).run()
    assert resumed.weights["student"].equal(straight.weights["student"])
    assert resumed.memory == straight.memory
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight/run")


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Later than the second that one Ctrl-C may need to come twice."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: next(clock))
    done = []

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        done.append(iteration)
        return square(w, draws, iteration)

    with pytest.raises(KeyboardInterrupt):
        scripted(tmp_path, Scripted({"student": loss})).run()
    assert done == []


def test_a_signal_in_the_last_iteration_changes_nothing(tmp_path: Path):
    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        if iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return square(w, draws, iteration)

    run = scripted(tmp_path, Scripted({"student": loss}))
    run.run()
    assert run.iteration == 6


def test_metrics_hold_the_latest_of_every_role(tmp_path: Path):
    """Every logging_steps and at the end; a role that did not step is not left out; resume writes the same lines."""
    every = {"student": 3}
    changes = {"max_train_steps": 7, "logging_steps": 2, "checkpointing_steps": 4}
    scripted(tmp_path / "a", Scripted({"student": square, "fake_score": square}, every=every), **changes).run()
    lines = metrics(tmp_path / "a/run")
    assert [line["iteration"] for line in lines] == [2, 4, 6, 7]
    wanted = {f"{role}/{what}" for role in ("student", "fake_score") for what in ("loss", "grad_norm")}
    assert all(line.keys() == {"iteration", "learning_rate"} | wanted for line in lines)
    steps = [line["student/loss"] for line in lines]  # in iterations 1, 4 and 7
    assert len(set(steps)) == 3
    assert steps[1] == steps[2]

    stopped = Scripted({"student": square, "fake_score": bad("loss", 5)}, every=every)
    with pytest.raises(UserError):
        scripted(tmp_path / "b", stopped, **changes).run()
    method = Scripted({"student": square, "fake_score": square}, every=every)
    scripted(tmp_path / "b", method, resume=True, **changes).run()
    assert metrics(tmp_path / "b/run") == lines


def test_the_best_checkpoint_is_kept(tmp_path: Path):
    """The lowest of the metric at a checkpoint, beside the last ones; also through a resume."""

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        return w.sum() * 0 + abs(iteration - 3) + 1  # lowest in iteration 4

    changes = {"best_metric": "student/loss", "max_train_steps": 12, "checkpoints_total_limit": 1}
    run = scripted(tmp_path, Scripted({"student": loss}), **changes)
    run.config = run.config.model_copy(update={"max_train_steps": 6})
    run.run()
    resumed = scripted(tmp_path, Scripted({"student": loss}), resume=True, **changes)
    resumed.run()
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-000004", "step-000012"]
    assert resumed.best == (1.0, 4)


def test_a_metric_that_nobody_logs_is_refused_at_the_first_line(tmp_path: Path):
    run = scripted(tmp_path, Scripted({"student": square}), best_metric="student/los")
    with pytest.raises(UserError, match="best_metric student/los: never logged; logged: student/grad_norm, student/l"):
        run.run()
    assert run.iteration == 1


def test_resume_without_a_whole_checkpoint_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Killed before the first one, or all torn: it says so, and lines that were logged come once."""
    straight = Scripted({"student": square})
    scripted(tmp_path / "straight", straight).run()
    with pytest.raises(UserError):
        scripted(tmp_path, Scripted({"student": bad("loss", 3)})).run()
    (tmp_path / "run/checkpoints/step-000002/manifest.json").unlink()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "stud')  # a line torn by a kill
    capsys.readouterr()
    resumed = Scripted({"student": square})
    scripted(tmp_path, resumed, resume=True).run()
    said = capsys.readouterr().err
    assert "step-000002: incomplete (FileNotFoundError); passed over" in said
    assert f"no whole checkpoint in {tmp_path / 'run/checkpoints'}: starting at iteration 0" in said
    assert resumed.weights["student"].equal(straight.weights["student"])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight/run")


def test_a_run_is_not_started_over_another(tmp_path: Path):
    """Nor resumed with other values of what its numbers depend on; each such key is named."""
    scripted(tmp_path, Scripted({"student": square})).run()
    with pytest.raises(UserError, match=r"run: holds a run already; --resume continues it, name=OTHER starts another"):
        scripted(tmp_path, Scripted({"student": square}))
    with pytest.raises(UserError, match=r"other values of seed \(was 0, now 1\), train_batch_size \(was 4, now 8\)"):
        scripted(tmp_path, Scripted({"student": square}), resume=True, seed=1, train_batch_size=8)
    longer = scripted(tmp_path, Scripted({"student": square}), resume=True, max_train_steps=8, logging_steps=2)
    longer.run()
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 8]
    assert TrainConfig.model_fields.keys() >= MAY_CHANGE


def test_a_folder_where_nothing_was_trained_holds_no_run(tmp_path: Path):
    """The first attempt ended before its first iteration: a mistake is corrected without a new name."""
    scripted(tmp_path, Scripted({"student": square}), seed=1)
    assert (tmp_path / "run/config.yaml").is_file()
    scripted(tmp_path, Scripted({"student": square}), seed=2).run()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_full_disk_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Whatever was being written; the checkpoint before is whole, and the run resumes from it."""
    run = scripted(tmp_path, Scripted({"student": square}))
    opened, made = Path.open, Path.mkdir

    def full(path: Path) -> None:
        if run.iteration == 4 and name in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def open_(self: Path, *args: Any, **kwargs: Any) -> Any:
        full(self)
        return opened(self, *args, **kwargs)

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        full(self)
        made(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            run.run()
    assert checkpoint.latest(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/step-000002", [])
    resumed, straight = Scripted({"student": square}), Scripted({"student": square})
    scripted(tmp_path, resumed, resume=True).run()
    scripted(tmp_path / "straight", straight).run()
    assert resumed.weights["student"].equal(straight.weights["student"])


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
