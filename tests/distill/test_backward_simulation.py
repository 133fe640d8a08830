"""DMD2's backward simulation: whose inputs, whose graph, whose turn, and what each loss reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.distill.batches import Batches
from fewstep.distill.data import Prompts
from fewstep.distill.networks import require_grad
from fewstep.distill.random import Rngs
from fewstep.samplers.plan import generators, sample
from fewstep.samplers.rules import randn
from tests.distill.gaussian import PROCESSES, Teacher, calls, lora
from tests.distill.test_distribution_matching import dmd2, prompts_of
from tests.pipelines import PROMPTS, tiny_ddpm, tiny_stable_diffusion

MEAN, STD = [0.7, -0.4], [0.5, 1.3]
SHIFT, SCALE = "0.4", 2.0


# the rollout


class Sequential(Rngs):
    """Draws as `plan.sample` makes them: one generator a row, each draw continuing it; a given count and stop."""

    def __init__(self, seeds: Sequence[int], stop: int):
        super().__init__(0, 0, range(len(seeds)))
        self.generators, self.stop = generators(seeds), stop

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        return randn((len(self.generators), *shape), self.generators)

    def shared(self, stream: str) -> torch.Generator:
        """Found by trial: a generator whose second integer below the number of steps is the stop."""
        for seed in range(1000):
            trial = torch.Generator().manual_seed(seed)
            torch.randint(1, (1,), generator=trial)
            if int(torch.randint(3, (1,), generator=trial)) == self.stop:
                return torch.Generator().manual_seed(seed)
        raise AssertionError


@pytest.mark.parametrize("name", [*PROCESSES, "ddpm"])
def test_backward_simulation_is_the_students_own_sampling(name: str, tmp_path: Path):
    """With the same noise the rollout's sample at stop i is the x0 that `plan.sample` has there: inputs are those of use.

    The first input is c z: exactly the noise that sampling starts from. `ddpm` clips x0 between its steps.
    """
    if name == "ddpm":
        made = lora(tmp_path, tiny_ddpm(clip_sample=True), method="dmd2", steps=[3])
        prompts = ["", ""]
    else:
        made = dmd2(tmp_path, Teacher(PROCESSES[name], MEAN, STD, side=2), steps=[3])
        prompts = [SHIFT, "1"]
        with torch.no_grad():  # a student that is not its teacher
            made.student.denoiser.network.scale += 0.05
    student, seeds = made.student.denoiser, [3, 4]
    batch = prompts_of(student, prompts)
    seen: list[Tensor] = []
    assert batch.condition is not None
    with calls(made) as sampled:
        last = sample(student, batch.condition, made.plan(3), seeds, callback=lambda i, x0, x: seen.append(x0.float()))
    assert torch.equal(seen[-1], last)
    clip = made.noise.clip_range
    for stop in range(3):
        with calls(made) as rolled:
            x0 = made.rollout(batch, Sequential(seeds, stop), graph=False)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        assert len(rolled) == stop + 1
        assert torch.allclose(x0, seen[stop], rtol=1e-4, atol=1e-4)
        assert torch.equal(rolled[0].x_t, sampled[0].x_t)
    z = randn(seen[0].shape, generators(seeds))
    assert torch.equal(sampled[0].x_t, (5 if name == "edm" else 1) * z)
    if clip is not None:
        assert (seen[0].abs() == clip).any()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_graph_of_one_student_call_is_kept(kind: str, tmp_path: Path):
    """The last call has a graph when the student steps, the ones before never; none has one when it does not."""
    if kind == "full":
        made = dmd2(tmp_path, Teacher(PROCESSES["flow"], MEAN, STD), steps=[4])
        batch = prompts_of(made.student.denoiser, [SHIFT] * 2)
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), method="dmd2", steps=[4])
        batch = prompts_of(made.student.denoiser, PROMPTS)
    require_grad(made.roles(), ["student", "fake_score"])
    stops = set()
    for i in range(12):
        for roles in (["student", "fake_score"], ["fake_score"]):
            with calls(made) as seen:
                draws = made.draw(batch, Rngs(0, i, range(2)), i, roles)
            graphs = [c.graph for c in seen]
            assert {c.role for c in seen} == {"student"}
            assert graphs[:-1] == [False] * (len(seen) - 1)
            assert graphs[-1] is (draws.x0.grad_fn is not None) is ("student" in roles)
            stops.add(len(seen))
    assert stops == {1, 2, 3, 4}


def test_the_step_is_drawn_once_for_all_samples_and_processes(tmp_path: Path):
    """Two processes and two micro-batches make the same number of calls in an iteration, every count and stop in turn."""
    teacher = Teacher(PROCESSES["flow"], MEAN, STD, side=1)
    made = dmd2(tmp_path, teacher, steps=[1, 3])
    found = []
    for i in range(60):
        times = []
        for rank in (0, 1):
            data, condition = Prompts([SHIFT] * 8), teacher.encode([SHIFT] * 8)
            batches = Batches(data, teacher.latent_shape(), condition, None, 0, 2, 2, rank, 2)
            for micro in (0, 1):
                with calls(made) as seen:
                    made.draw(*batches(i, micro), i, ["fake_score"])
                assert all((c.time == c.time[0]).all() for c in seen)
                times.append([round(c.time[0].item()) for c in seen])
        assert times == [times[0]] * 4
        found.append(tuple(times[0]))
    one = found.count((1000,))
    # a count of 1 half the time, a count of 3 that stops at once a sixth: 40 of 60 expected, a deviation of 3.7
    assert abs(one - 40) < 15
    assert set(found) == {(1000,), (1000, 667), (1000, 667, 333)}


def test_no_noise_is_used_twice(tmp_path: Path):
    """Start, each renoising, and level and noise of each role: what is drawn in an iteration has a stream of its own."""

    class Noted(Rngs):
        def _rows(self, stream: str) -> list[torch.Generator]:
            streams.append(stream)
            return super()._rows(stream)

    made = dmd2(tmp_path, Teacher(PROCESSES["flow"], MEAN, STD, side=1), steps=[4])
    counts = set()
    for i in range(12):
        streams: list[str] = []
        made.draw(prompts_of(made.student.denoiser, [SHIFT]), Noted(0, i, [0]), i, ["student", "fake_score"])
        assert len(set(streams)) == len(streams)
        counts.add(len(streams))
    assert counts == {1 + 4, 2 + 4, 3 + 4, 4 + 4}


# whose turn it is, and what it reaches


def test_rhythm(tmp_path: Path):
    """Three iterations of warm-up, then the student in every second one, always before the fake score."""
    made = dmd2(tmp_path, Teacher(PROCESSES["flow"], [0.0], [1.0]), fake_score_updates=2, fake_score_warmup_steps=3)
    both = ["student", "fake_score"]
    alone = ["fake_score"]
    assert [made.updates(i) for i in range(8)] == [alone, alone, alone, both, alone, both, alone, both]
    assert dmd2(tmp_path, Teacher(PROCESSES["flow"], [0.0], [1.0]), fake_score_updates=1).updates(0) == both


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_loss_reaches_its_own_role_alone(kind: str, tmp_path: Path):
    """With every parameter open, the teacher's too: what stays without gradient is out of the graph, not just frozen."""
    if kind == "full":
        made = dmd2(tmp_path, Teacher(PROCESSES["flow"], MEAN, STD), steps=[2])
        batch = prompts_of(made.student.denoiser, [SHIFT] * 2)
        base = dict(made.teacher.denoiser.network.named_parameters())
    else:
        made = lora(tmp_path, tiny_stable_diffusion(), method="dmd2", steps=[2])
        batch = prompts_of(made.student.denoiser, PROMPTS)
        module = made.teacher.denoiser.network.module
        base = {k: p for k, p in module.named_parameters() if ".lora_" not in k}
    roles = {"teacher": base, "student": made.student.parameters, "fake_score": made.fake_score.parameters}
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    assert draws.x0.grad_fn is None  # nothing was open
    require_grad(made.roles(), ["student", "fake_score"])
    draws = made.draw(batch, Rngs(0, 0, range(2)), 0, ["student", "fake_score"])
    if kind == "full":  # of LoRA roles the base is in the student's own forward, too
        for p in base.values():
            p.requires_grad_(True)
    for role in ("student", "fake_score"):
        (losses,) = made.loss(role, batch, draws, 0)
        losses.total.backward()
        reached = {
            name: sum(p.grad is not None and bool(p.grad.any()) for p in ps.values()) for name, ps in roles.items()
        }
        others = {name for name in roles if name != role}
        assert reached[role] > 0
        assert all(p.grad is None for name in others for p in roles[name].values())
        for p in roles[role].values():
            p.grad = None


def test_levels_of_each_role(tmp_path: Path):
    """Scores are compared in min_level..max_level, before a flow's shift; the fake score learns in all of (0, 1].

    Each of the two draws its own, as it does its noise.
    """
    teacher = Teacher(PROCESSES["flow_shifted"], [0.0], [1.0], side=1)
    made = dmd2(tmp_path, teacher, min_level=0.3, max_level=0.6)
    rng = Rngs(0, 0, range(400))
    draws = made.draw(prompts_of(teacher, [""] * 400), rng, 0, ["student", "fake_score"])
    student, fake = (made.noise.unshift(draws.t[role]) for role in ("student", "fake_score"))  # type: ignore[attr-defined]
    # the extremes of 400 uniform draws are within 2% of the ends with a probability of 99.9%
    assert student.min().item() == pytest.approx(0.3, abs=0.006)
    assert student.max().item() == pytest.approx(0.6, abs=0.006)
    assert fake.min().item() == pytest.approx(0, abs=0.02)
    assert fake.max().item() == pytest.approx(1, abs=0.02)
    assert fake.min() > 0
    pairs = torch.stack([student, fake, draws.eps["student"].flatten(), draws.eps["fake_score"].flatten()])
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.2  # a deviation of 5%


# instead of a rollout


def test_noised_data(tmp_path: Path):
    """One call of the student whatever the step: on c z at the first, on real latents noised to its level at others."""
    teacher = Teacher(PROCESSES["flow_shifted"], MEAN, STD, side=2)
    made = dmd2(tmp_path, teacher, steps=[3], policy="noised_data", train_data="in memory")
    batch = prompts_of(teacher, [SHIFT] * 2)
    batch.x0 = randn((2, *batch.shape), generators([1, 2]))
    levels = set()
    for i in range(12):
        rng = Rngs(0, i, range(2))
        with calls(made) as seen:
            made.draw(batch, rng, i, ["fake_score"])
        (call,) = seen
        z, t = rng.normal("start", batch.shape), made.noise.from_model_time(call.time).float()
        wanted = z if t[0] == 1 else made.noise.add(batch.x0, z, t)
        assert torch.allclose(call.x_t, wanted, atol=1e-6)
        levels.add(round(made.noise.unshift(t)[0].item(), 4))  # type: ignore[attr-defined]
    assert levels == {1, 0.6667, 0.3333}
    assert made.forwards()["fake_score"] == {"forward": 1, "backward": 1}
    assert "images" in made.needs_of(made.config)
