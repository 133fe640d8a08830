"""The regression to the teacher's pairs: its gradient, its fixed point, what it costs and reaches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Batch, Pairs
from fewstep.distill.networks import require_grad
from fewstep.distill.objectives import regression
from fewstep.distill.pairs import StoredPairs
from fewstep.distill.random import Rngs
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.exact import SHIFT, Laws, exact, moments, prompts_of
from tests.distill.gaussian import PROCESSES, Teacher, affine, calls, lora, method, rows_by_backward, under_training
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion

DMD: dict[str, Any] = {"method": "dmd", "regression_metric": "squared", "guidance_scale": 2.0}
METRICS = ("squared", "pseudo_huber")


def paired(made: Any, batch: Batch, z: Tensor, x: Tensor) -> Batch:
    assert batch.condition is not None
    batch.pairs = Pairs(z, x, batch.condition)
    return batch


def gaussian_pairs(made: Any, teacher: Teacher, n: int = 64) -> Batch:
    """Of the exact guided ODE map, in float64; the guided teacher's shift is twice the prompt's."""
    z = randn((n, *teacher.latent_shape()), generators(range(n))).double()
    top = torch.ones(n).double()
    x = teacher.exact_ode(made.scale * z, top, 0 * top, 2 * SHIFT)
    return paired(made, prompts_of(teacher, [str(SHIFT)] * n), z, x)


def of_gaussian(folder: Path, name: str, **changes: Any) -> tuple[Any, Batch]:
    """A student whose x0 is mean + std / v (x_t - alpha mean): at the guided teacher's numbers the ODE map itself."""
    teacher = Teacher(PROCESSES[name], [0.7, -0.4], [0.5, 1.3], side=4)
    made = method(folder, teacher, **(DMD | changes))
    student = made.student.denoiser.network.double()
    student.jump = True
    with torch.no_grad():  # in float32 off by 1e-8
        student.gain.fill_(2.0)
        student.mean.copy_(teacher.mean)
        student.log_std.copy_(teacher.std.double().log())
    teacher.network.double()
    return made, gaussian_pairs(made, teacher)


# the distance


def test_direction():
    """N times the gradient: 2 e, and e / sqrt(e^2 + c^2); distances are means over a row's elements."""
    x0, x = torch.tensor([[1.0, 2.0], [0.0, 0.5]]), torch.tensor([[0.0, 4.0], [0.0, 0.5]])
    e = x0 - x
    settings: Any = config(Path(), method="dmd", regression_metric="squared")
    d, values = regression.direction(x0, x, regression.distance_of(settings, 0.1, SimpleNamespace()))  # type: ignore[arg-type]
    assert torch.allclose(d, 2 * e)
    assert values.tolist() == [2.5, 0]
    settings = settings.model_copy(update={"regression_metric": "pseudo_huber"})
    d, values = regression.direction(x0, x, regression.distance_of(settings, 0.1, SimpleNamespace()))  # type: ignore[arg-type]
    root = (e.square() + 0.01).sqrt()
    assert torch.allclose(d, e / root, atol=1e-6)
    assert torch.allclose(values, (root - 0.1).mean(1), atol=1e-6)
    assert not d.requires_grad


@pytest.mark.parametrize("name", PROCESSES)
def test_gradient(name: str, tmp_path: Path):
    """x0 = (1 - k a) m + k c z, k = std / v at the top level; off the target by e: d/dm of w E e^2 is 2 w (1 - k a) E e."""
    made, batch = of_gaussian(tmp_path, name, regression_weight=0.25)
    network = made.student.denoiser.network
    with torch.no_grad():
        network.mean += torch.tensor([0.2, -0.1]).double().reshape(2, 1, 1)
        network.log_std += 0.3
    require_grad(made.roles(), ["student"])
    made.regression(batch).total.backward()
    t = made.noise.shift(torch.ones(()).double())
    a, s = made.noise.alpha(t), made.noise.sigma(t)
    std, mean = network.log_std.exp(), network.mean + 2 * SHIFT
    k = std / (a**2 * std**2 + s**2).sqrt()
    e = (1 - k * a) * mean + k * made.scale * batch.pairs.z - batch.pairs.x
    wanted = 0.25 * 2 * (1 - k * a) * e.mean((0, 2, 3), keepdim=True)[0] / 2  # of two channels
    assert torch.allclose(network.mean.grad, wanted.detach(), rtol=1e-6, atol=1e-9)
    assert wanted.abs().min() > 1e-4


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["vp", "flow_shifted", "edm"])
def test_the_fixed_point_is_the_teachers_ode_map(name: str, metric: str, tmp_path: Path):
    """The exact map has no gradient, in any distance; its reflection, of the same law, has."""
    made, batch = of_gaussian(tmp_path, name, regression_metric=metric, huber_c=0.1)
    require_grad(made.roles(), ["student"])
    losses = made.regression(batch)
    losses.total.backward()
    assert losses.scalars["regression"] < 1e-10
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in made.student.parameters.values())
    center = 2 * batch.pairs.x.mean((0, 2, 3), keepdim=True)
    reflected = paired(made, batch, batch.pairs.z, center - batch.pairs.x)
    made.regression(reflected).total.backward()
    assert made.student.parameters["network.log_std"].grad.abs().min() > 1e-3


def test_the_divergence_cannot_tell_the_reflected_map(tmp_path: Path):
    """m - S z has the teacher's law: DMD's direction vanishes there, and pairs alone say which map is meant."""
    x = Laws(m=0.7, S=0.5, b=0.7, c=0.5)
    made = exact(tmp_path, "flow", x, **(DMD | {"guidance_scale": 1.0, "regression_weight": 0.0}))
    with torch.no_grad():  # the prompt moves both alike
        made.fake_score.denoiser.network.gain.fill_(1.0)
    mean, slope = moments(made, Laws(m=x.m, S=x.S, b=x.b + SHIFT, c=-x.c))
    assert mean.abs().max() < 1e-6
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("metric", METRICS)
def test_a_student_trained_by_it_alone_reproduces_the_map(metric: str, tmp_path: Path):
    """From the teacher's own one step, whose samples are its mean, to offset and gain of the ODE map, both channels."""
    teacher = Teacher(PROCESSES["vp"], [0.7, -0.4], [0.5, 1.3], side=4)
    made = method(tmp_path, teacher, **(DMD | {"regression_metric": metric, "huber_c": 0.1}))
    batch = gaussian_pairs(made, teacher)
    network = made.student.denoiser.network.double()
    require_grad(made.roles(), ["student"])
    optimizer = torch.optim.LBFGS([network.scale, network.offset], max_iter=100, line_search_fn="strong_wolfe")
    t = made.noise.shift(torch.ones(()).double())
    told = batch.pairs.condition

    def loss() -> Tensor:  # the surrogate's value is not the distance, its gradient is
        optimizer.zero_grad()
        losses = made.regression(batch)
        losses.total.backward()
        return losses.scalars["regression"]

    before = (made.student.denoiser.x0(batch.pairs.z, t, told) - batch.pairs.x).abs().max()
    optimizer.step(loss)  # type: ignore[arg-type]
    gain, offset = affine(made.student.denoiser, 1.0, str(SHIFT))
    a, s = made.noise.alpha(t), made.noise.sigma(t)
    std, mean = teacher.std.flatten().double(), teacher.mean.flatten().double() + 2 * SHIFT
    k = std / (a**2 * std**2 + s**2).sqrt()
    assert before > 0.5
    torch.testing.assert_close(gain, k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offset, (1 - k * a) * mean, rtol=1e-4, atol=1e-4)


# in the method


def stored(batch: Batch) -> StoredPairs:
    """Pairs of a batch as `Batches` takes them."""
    pairs = batch.pairs
    assert pairs is not None

    class Held(StoredPairs):
        def __getitem__(self, numbers: Any) -> dict[str, Tensor]:
            rows = {"z": pairs.z, "x": pairs.x, "between": pairs.between}
            return {k: v[list(numbers)].float() for k, v in rows.items() if v is not None}

    return Held(None, [0] * len(pairs.z))  # type: ignore[arg-type]


def with_pairs(folder: Path, made: Any, teacher: Teacher) -> Any:
    """A trainer on eight pairs; of a trajectory with a state in the middle."""
    trainer = under_training(folder, made, teacher, [str(SHIFT)] * 4)
    batch = gaussian_pairs(made, teacher, 8)
    assert batch.pairs is not None
    if made.config.policy == "trajectory":
        batch.pairs.between = batch.pairs.x[:, None]
    trainer.batches.pairs = stored(batch)
    return trainer


@pytest.mark.parametrize(
    "changes",
    [{}, {"steps": [1, 2], "fake_score_updates": 2}, {"guidance_scale": 1.0}, {"method": "tdm", "steps": [2]}],
    ids=str,
)
def test_cost_is_as_declared(changes: dict[str, Any], tmp_path: Path):
    """One call of the student with a graph on top, in the student's turn; pairs cost nothing while a student trains."""
    teacher = Teacher(PROCESSES["vp"], [0.7], [0.5], side=1)
    made = method(tmp_path, teacher, **(DMD | {"train_batch_size": 2, "regression_weight": 0.25} | changes))
    trainer = with_pairs(tmp_path, made, teacher)
    plain = method(tmp_path, teacher, **(DMD | {"regression_weight": 0.0} | changes))
    for i in range(3):
        with calls(made) as seen:
            said = trainer.step(i)
        roles = made.updates(i)
        named = " and ".join(roles)
        graphs = rows_by_backward(seen, 2)[True]
        assert graphs == made.forwards()[named]["backward"]
        assert graphs - plain.forwards()[named]["backward"] == ("student" in roles)
        assert made.forwards()[named]["forward"] == plain.forwards()[named]["forward"]
        assert ("student/regression" in said) is ("student" in roles)


@pytest.mark.parametrize("changes", [{}, {"method": "tdm", "steps": [2]}], ids=["dmd", "tdm"])
def test_pairs_alone_come_first(changes: dict[str, Any], tmp_path: Path):
    """One call, one role, the regression's own gradient; other warm-ups are counted from where that of the pairs ends."""
    teacher = Teacher(PROCESSES["vp"], [0.7], [0.5], side=1)
    changes = DMD | {"train_batch_size": 2, "regression_weight": 0.25, "regression_warmup_steps": 2} | changes
    made = method(tmp_path, teacher, **changes, fake_score_warmup_steps=1)
    turns = [["student"], ["student"], ["fake_score"], ["student", "fake_score"]]
    assert [made.updates(i) for i in range(4)] == turns
    trainer = with_pairs(tmp_path, made, teacher)
    for i, roles in enumerate(turns):
        before = {k: p.clone() for k, p in made.fake_score.parameters.items()}
        micro, rng = trainer.batches(i, 0)
        assert micro.pairs is not None
        paired = made.draw(micro, rng, i, roles).paired
        wanted = made.regression(micro, paired).scalars["regression"].item()
        with calls(made) as seen:
            said = trainer.step(i)
        declared = made.forwards()[" and ".join(roles)]
        assert rows_by_backward(seen, 2) == {False: declared["forward"], True: declared["backward"]}
        moved = [k for k, p in made.fake_score.parameters.items() if not torch.equal(p, before[k])]
        assert bool(moved) is ("fake_score" in roles)
        if i < 2:
            assert said.keys() == {"student/regression", "student/grad_norm"}
            assert said["student/regression"] == pytest.approx(wanted, rel=1e-5)
            assert (paired is None) is (made.config.policy != "trajectory")
    with pytest.raises(ConfigError, match="regression_warmup_steps 5: there are no pairs; set regression_weight"):
        config(tmp_path, **(DMD | {"regression_weight": 0.0, "regression_warmup_steps": 5}))


def test_weight_zero_is_the_method_without(tmp_path: Path):
    """To the bit: no pairs, one loss, the same draws; and with a weight the divergence's loss stays what it is."""
    teacher = Teacher(PROCESSES["flow"], [0.7], [0.5], side=2)
    found = {}
    for weight in (0.0, 0.25):
        made = method(tmp_path, teacher, **(DMD | {"regression_weight": weight}))
        batch = gaussian_pairs(made, teacher, 4)
        assert batch.pairs is not None
        batch.pairs.z, batch.pairs.x = batch.pairs.z.float(), batch.pairs.x.float()
        draws = made.draw(batch, Rngs(0, 0, range(4)), 0, ["student", "fake_score"])
        found[weight] = [[losses.total for losses in made.loss(r, batch, draws, 0)] for r in ("student", "fake_score")]
    assert [len(losses) for losses in found[0.0]] == [1, 1]
    assert [len(losses) for losses in found[0.25]] == [2, 1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found[0.0], found[0.25], strict=True))
    needs = made.needs_of(config(tmp_path, **DMD))
    assert needs == {"prompts", "pairs"}
    assert made.needs_of(config(tmp_path, method="dmd2")) == {"prompts"}
    assert made.needs_of(config(tmp_path, **(DMD | {"regression_weight": 0.0}))) == {"prompts"}


def test_it_reaches_the_student_alone_with_a_graph_of_its_own(tmp_path: Path):
    """Built after the first loss was differentiated and its graph freed, at the noises of the pairs and the top level."""
    made = lora(tmp_path, tiny_stable_diffusion(), **DMD)
    batch = prompts_of(made.student.denoiser, PROMPTS)
    z, x = (randn((2, *batch.shape), generators([s, s + 1])) for s in (0, 5))
    batch = paired(made, batch, z, x)
    require_grad(made.roles(), ["student", "fake_score"])
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student"])
    losses = made.loss("student", batch, draws, 0)
    next(losses).total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        draws.x0.sum().backward()
    first = {k: p.grad.clone() for k, p in made.student.parameters.items()}
    with calls(made) as seen:
        second = next(losses)
    assert [(c.role, c.graph) for c in seen] == [("student", True)]
    assert torch.equal(seen[0].x_t, z)
    assert seen[0].time.tolist() == [999.0, 999.0]
    second.total.backward()
    assert any(not torch.equal(first[k], p.grad) for k, p in made.student.parameters.items())
    assert all(p.grad is None for p in made.fake_score.parameters.values())


@pytest.mark.parametrize(
    "changes", [{"steps": [4]}, {"policy": "noised_data", "steps": [2]}, {"policy": "phases"}], ids=str
)
def test_what_has_no_one_step_is_refused(changes: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match="regression_weight: compares what the student's one step makes of a noise"):
        config(tmp_path, **(DMD | changes))
