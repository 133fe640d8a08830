"""Phased DMD: a network for each phase, jumps to its end, whose turn it is, and what stands still meanwhile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Role
from fewstep.distill.methods import why_not
from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.networks import require_grad
from fewstep.distill.objectives.phases import phase_of
from fewstep.distill.random import Rngs
from fewstep.distill.run import networks_of, train
from fewstep.samplers.adapters import Adapted, bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.denoisers.dit import DiT
from fewstep.samplers.denoisers.stable_diffusion import StableDiffusion
from fewstep.samplers.denoisers.wan import Wan
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, load, load_student
from fewstep.samplers.noise import Discrete, NoiseProcess
from fewstep.samplers.plan import sample
from tests.distill.exact import SHIFT, prompts_of
from tests.distill.gaussian import PROCESSES, Network, Teacher, calls, method, rows_by_backward, under_training
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion

MEAN, STD = [0.7, -0.4], [0.5, 1.3]


class Halves:
    """Two networks: "high" takes the levels above 0.5, "low" the rest."""

    noise: NoiseProcess

    @property
    def boundaries(self) -> tuple[float, ...]:
        return (0.501 if isinstance(self.noise, Discrete) else 0.50001,)  # the level next above 0.5

    def route(self, time: Tensor) -> dict[str, Tensor]:
        high = self.noise.from_model_time(time) > self.boundaries[0] - 1e-6
        sides = {"high": high.nonzero()[:, 0], "low": (~high).nonzero()[:, 0]}
        return {name: rows for name, rows in sides.items() if len(rows)}


class Experts(Halves, Teacher):
    def __init__(self, noise: NoiseProcess, mean: list[float], std: list[float], side: int = 1, knots: int = 4):
        super().__init__(noise, mean, std, side, knots)
        one = (len(mean), 1, 1)
        self.networks = {n: Network(noise, self.mean, self.std, knots, one) for n in ("high", "low")}


def phased(folder: Path, name: str = "flow", **changes: Any) -> DistributionMatching:
    made = method(folder, Experts(PROCESSES[name], MEAN, STD), **({"method": "phased_dmd"} | changes))
    assert isinstance(made, DistributionMatching)
    return made


def lora_phases(folder: Path, teacher: Denoiser, **changes: Any) -> DistributionMatching:
    settings = config(folder, **({"method": "phased_dmd", "student": "lora"} | changes))
    return DistributionMatching(settings, networks_of(settings, teacher))  # type: ignore[arg-type]


def move(role: Role, seed: int) -> None:
    """Somewhere else than its teacher, each parameter by a draw of its own."""
    random = torch.Generator().manual_seed(seed)
    for _, p in sorted(role.parameters.items()):
        p.data = 0.3 * torch.randn(p.shape, generator=random)


def test_what_has_no_phases_is_refused(tmp_path: Path):
    """A backbone whose pipeline loads no LoRA; full weights of one network; levels and steps that make no phases."""
    made = config(tmp_path, method="phased_dmd")
    assert why_not(made, StableDiffusion) is None
    assert "a pipeline that loads a LoRA for each" in str(why_not(made, DiT))
    full = config(tmp_path, method="phased_dmd", student="full")
    assert "set student: lora" in str(why_not(full, StableDiffusion))
    assert why_not(full, Wan) is None
    assert "set student: lora" in str(why_not(full, Wan, ["transformer"]))
    with pytest.raises(UserError, match="phases of one network are LoRAs of it; set student: lora"):
        method(tmp_path, Teacher(PROCESSES["flow"], MEAN, STD), method="phased_dmd")
    with pytest.raises(UserError, match="phases: 3 do not divide 4 steps"):
        lora_phases(tmp_path, denoiser_of(tiny_stable_diffusion()), phases=3)
    with pytest.raises(UserError, match="phases: 2 do not divide 3 steps"):
        phased(tmp_path, steps=[3])
    with pytest.raises(UserError, match=r"in the phase from 0.45 to 0.5, where a network of the teacher ends"):
        phased(tmp_path, init_level=0.45)
    for changes, words in (
        ({"steps": [2, 4]}, "policy phases trains one step count"),
        ({"parts": 2}, "parts 2: several students of phases"),
        ({"fake_score_target": "x0_hat"}, "fake_score_target x0_hat: of policy trajectory, now phases"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path, method="phased_dmd", **changes)


def test_whose_turn_it_is(tmp_path: Path):
    """Sequential: half the run each, a warm-up of the fake score at the start of both; else the student's turns by turns."""
    settings = {"method": "phased_dmd", "max_train_steps": 10, "fake_score_updates": 2, "fake_score_warmup_steps": 1}
    one = config(tmp_path, **settings)
    found = [phase_of(i, 2, one) for i in range(10)]  # type: ignore[arg-type]
    assert found == [(0, -1), (0, 0), (0, 1), (0, 2), (0, 3), (1, -1), (1, 0), (1, 1), (1, 2), (1, 3)]
    turns = config(tmp_path, **settings, phase_order="alternating")
    found = [phase_of(i, 2, turns) for i in range(8)]  # type: ignore[arg-type]
    assert found == [(0, -2), (1, -1), (0, 0), (0, 1), (1, 2), (1, 3), (0, 4), (0, 5)]  # both are warmed up first
    made = phased(tmp_path, max_train_steps=10, fake_score_updates=2, fake_score_warmup_steps=1)
    both, alone = ["student", "fake_score"], ["fake_score"]
    assert [made.updates(i) for i in range(10)] == [alone, both, alone, both, alone] * 2


@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_a_jump_goes_to_the_phases_end(name: str, tmp_path: Path):
    """From both of its steps by the ode rule, though sampling stops between; earlier steps are sampling's.

    Levels of both roles: within the phase, above the margin for the student's.
    """
    made = phased(tmp_path, name, max_train_steps=40, fake_score_updates=1)
    with torch.no_grad():  # a student that is not its teacher, a different one in each phase
        made.student.denoiser.networks["high"].scale += 0.05
        made.student.denoiser.networks["low"].scale -= 0.05
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 8)
    noise, student, plan = made.noise, made.student.denoiser, made.plan(4)
    assert batch.condition is not None
    seen = set()
    for i in range(40):
        rng = Rngs(0, i, range(8))
        with calls(made) as called:
            draws = made.draw(batch, rng, i, ["student", "fake_score"])
        stop, to = len(called) - 1, 0.5 if i < 20 else 0.0
        x = plan.initial_scale * rng.normal("start", batch.shape)
        for k, step in enumerate(plan.steps[: stop + 1]):
            t, s = (torch.tensor(v) for v in (step.level, to if k == stop else step.to))
            x0 = student.x0(x, t, batch.condition)
            x = noise.add(x0, noise.eps_of_x0(x0, x, t), s)
        for role, margin in (("student", 0.02), ("fake_score", 0.0)):
            at = draws.point
            assert at is not None
            assert torch.allclose(at.x, x, rtol=1e-4, atol=1e-4)
            assert (at.to == to).all()
            assert (at.start == to + 0.5).all()
            assert (draws.t[role] > to + margin - 1e-6).all()
            assert (draws.t[role] <= to + 0.5).all()
        seen.add((to, stop))
    assert seen == {(0.5, 0), (0.5, 1), (0.0, 2), (0.0, 3)}


def test_the_other_phases_networks_stand_still(tmp_path: Path):
    """Of student and fake score, without a gradient and through the optimiser; each is trained in its own phase."""
    teacher = Experts(PROCESSES["flow"], MEAN, STD)
    made = phased(tmp_path, max_train_steps=4, fake_score_updates=1, train_batch_size=2)
    trainer = under_training(tmp_path, made, teacher, [str(SHIFT)] * 2)
    trained = {0: "high", 1: "high", 2: "low", 3: "low"}
    for i, network in trained.items():
        before = {
            (role, k): p.detach().clone()
            for role in ("student", "fake_score")
            for k, p in made.roles()[role].parameters.items()
        }
        trainer.step(i)
        moved = {
            (role, k.split(".")[0])
            for (role, k), value in before.items()
            if not torch.equal(value, made.roles()[role].parameters[k])
        }
        # the student's first step is nothing: fake score and teacher are still one up to guidance
        assert moved <= {("student", network), ("fake_score", network)}
        assert ("fake_score", network) in moved
        assert ("student", network) in moved


def test_at_the_last_phase_it_is_dmd(tmp_path: Path):
    """s = 0: the student's loss and the fake score's are DMD2's on the same draws (the unified view)."""
    made = phased(tmp_path, max_train_steps=2, fake_score_updates=1)
    with torch.no_grad():
        for network in made.fake_score.denoiser.networks.values():
            network.mean += 0.2
    batch = prompts_of(made.teacher.denoiser, [str(SHIFT)] * 8)
    require_grad(made.roles(), ["student"])
    draws = made.draw(batch, Rngs(0, 1, range(8)), 1, ["student", "fake_score"])
    assert draws.point is not None
    assert (draws.point.s == 0).all()
    found = {}
    for point in (draws.point, None):
        draws.point = point
        for role in ("student", "fake_score"):
            (losses,) = made.loss(role, batch, draws, 1)
            found[role, point is not None] = losses.total.item()
    for role in ("student", "fake_score"):
        assert found[role, True] == pytest.approx(found[role, False], rel=1e-5)
        assert found[role, True] > 1e-6


@pytest.mark.parametrize("order", ["sequential", "alternating"])
def test_cost_is_as_declared(order: str, tmp_path: Path):
    """Rows in an iteration less the rollout's, whose stop is drawn; that is 0 or 1 calls in the first phase, 2 or 3 then."""
    changes = {"max_train_steps": 8, "fake_score_updates": 2, "train_batch_size": 2, "phase_order": order}
    teacher = Experts(PROCESSES["flow"], MEAN, STD)
    made = phased(tmp_path, **changes)
    assert made.forwards()["student and fake_score"] == {"forward": 1.5 + 2 + 1, "backward": 2}
    trainer = under_training(tmp_path, made, teacher, [str(SHIFT)] * 2)
    for i in range(8):
        with calls(made) as seen:
            trainer.step(i)
        number, _ = phase_of(i, 2, made.config)
        student = [c.graph for c in seen if c.role == "student"]
        assert student[:-1] == [False] * (len(student) - 1)
        assert student[-1] is ("student" in made.updates(i))
        assert len(student) - 1 in made.phases[number]
        rows = rows_by_backward(seen, 2)
        declared = made.forwards()[" and ".join(made.updates(i))]
        assert rows[True] == declared["backward"]
        assert rows[False] - (len(student) - 1) == declared["forward"] - 1.5


# one network, a LoRA for each phase


class TwoNetworks(Halves, StableDiffusion):
    """A Stable Diffusion whose levels are split between two copies of its network, as Wan 2.2's are."""

    def __init__(self, pipeline: Any):
        super().__init__(pipeline, {"high": pipeline.unet, "low": copy.deepcopy(pipeline.unet)})


def test_loras_of_one_network_are_trained_as_two_networks_are(tmp_path: Path):
    """The same weights in both: all draws and losses of either phase are equal."""
    one = lora_phases(tmp_path, denoiser_of(tiny_stable_diffusion()), max_train_steps=8, fake_score_updates=1)
    two = lora_phases(tmp_path, TwoNetworks(tiny_stable_diffusion()), max_train_steps=8, fake_score_updates=1)
    assert one.phases == two.phases == [range(0, 2), range(2, 4)]
    assert [step.network for step in one.plan(4).steps] == [0, 0, 1, 1]
    for seed, name in enumerate(("student", "fake_score")):
        own = one.roles()[name]
        move(own, seed)
        names = {"high": "phase_1", "low": "phase_2"}
        of = two.roles()[name].parameters
        assert len(of) == len(own.parameters)
        for key, p in of.items():
            network, _, rest = key.partition(".")
            p.data = own.parameters[f"{names[network]}.{rest}"].data.clone()
    batch = prompts_of(one.teacher.denoiser, PROMPTS)
    found: list[dict[str, float]] = []
    for made in (one, two):
        for i in (0, 1, 4, 7):
            roles = made.updates(i)
            draws = made.draw(batch, Rngs(0, i, range(2)), i, roles)
            losses = {role: next(iter(made.loss(role, batch, draws, i))).total.item() for role in roles}
            assert draws.point is not None
            found.append(losses | {"x": draws.point.x.norm().item()})
    for a, b in zip(found[:4], found[4:], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert all(abs(v) > 1e-6 for v in a.values())


def test_the_other_phases_lora_stands_still(tmp_path: Path):
    """Through the optimiser, whose decay and moments would move what gets no gradient."""
    teacher = denoiser_of(tiny_stable_diffusion())
    made = lora_phases(tmp_path, teacher, max_train_steps=4, fake_score_updates=1, train_batch_size=2)
    trainer = under_training(tmp_path, made, teacher, PROMPTS)
    for i, phase in enumerate(["phase_1", "phase_1", "phase_2", "phase_2"]):
        before = {(r, k): p.detach().clone() for r in made.updates(i) for k, p in made.roles()[r].parameters.items()}
        trainer.step(i)
        moved = {
            (r, k.partition(".")[0])
            for (r, k), v in before.items()
            if not torch.equal(v, made.roles()[r].parameters[k])
        }
        assert moved == {("student", phase), ("fake_score", phase)}


def test_a_run_leaves_a_lora_for_each_phase(tmp_path: Path):
    """Sampled by the level: as one LoRA after the other, by hand."""
    base = tmp_path / "base"
    tiny_stable_diffusion(base)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {"method": "phased_dmd", "teacher": str(base), "max_train_steps": 4, "fake_score_updates": 1}
    settings |= {"train_data": None, "prompts": str(tmp_path / "prompts.txt")}
    folder = train(config(tmp_path, **settings, learning_rate=0.5, train_batch_size=2))
    names = {p.name for p in (folder / "student").glob("*.safetensors")}
    assert names == {f"pytorch_lora_weights_phase_{i}.safetensors" for i in (1, 2)}
    student, manifest = load_student(folder, fuse=True)
    assert manifest.phase_ends == student.phase_ends == (0.5,)
    plan = manifest.plan(4)
    condition, network = student.encode(PROMPTS), bare(student.network)
    ours = sample(student, condition, plan, [0, 1])
    alone = [denoiser_of(student.pipeline).with_networks({"unet": Adapted(network, f"phase_{i}")}) for i in (1, 2)]
    by_hand = sample(alone[0], condition, plan, [0, 1], members=[alone[1]])
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)
    for one in alone:
        assert (sample(one, condition, plan, [0, 1], members=[one]) - ours).norm() > 0.01 * ours.norm()
    with pytest.raises(UserError, match="a LoRA for each phase, which cannot be added into one set of weights"):
        load(folder)
    again = {**settings, "teacher": str(folder), "name": "again"}
    with pytest.raises(ConfigError, match="a LoRA student, on which phases, LoRAs too, cannot be loaded"):
        train(config(tmp_path, **again))
