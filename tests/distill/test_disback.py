"""DisBack: the recorded path, the walk back along it, and the plain method where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill import memory
from fewstep.distill.config import ConfigError
from fewstep.distill.methods.disback import DisBack
from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.networks import require_grad
from fewstep.distill.random import Rngs
from fewstep.samplers.denoisers.base import Denoiser
from tests.distill.exact import SHIFT, Laws, assert_relative, exact, levels, moments, prompts_of
from tests.distill.gaussian import (
    PROCESSES,
    Teacher,
    affine,
    calls,
    is_as_declared,
    laws,
    lora,
    method,
    under_training,
)
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion

MEAN, STD = [0.7, -0.4], [0.5, 1.3]
PATH: dict[str, Any] = {  # recorded after 2, 4 and 6 iterations; nodes 2 and 1 two iterations each, the teacher from 10
    **{"method": "disback", "nodes": 3, "fake_score_warmup_steps": 6, "node_steps": 2, "path_share": 0.0},
    **{"max_train_steps": 12, "train_batch_size": 2, "fake_score_updates": 1},
}


def kinds(folder: Path, kind: str, **changes: Any) -> tuple[DisBack, Denoiser, list[str]]:
    """A method over Gaussian copies or over LoRA roles on a tiny pipeline, its teacher and two prompts."""
    if kind == "full":
        teacher = Teacher(PROCESSES["flow"], MEAN, STD)
        return method(folder, teacher, **(PATH | changes)), teacher, [str(SHIFT)] * 2
    made = lora(folder, tiny_stable_diffusion(), perturbed=False, **(PATH | changes))
    return made, made.teacher.denoiser, PROMPTS


def seen_at(denoiser: Denoiser, prompts: list[str], x: Tensor) -> Tensor:
    """Its x0 prediction at half the noise."""
    with torch.no_grad():
        return denoiser.x0(x, torch.tensor(0.5), denoiser.encode(prompts))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_target_is_the_fake_score_as_it_was(kind: str, tmp_path: Path):
    """In every iteration, by its output: after 4 updates, after 2, and the teacher's own. The student first stands still.

    Each switch changes the output; published code loaded nothing, and did not say so.
    """
    made, teacher, prompts = kinds(tmp_path, kind)
    x = torch.randn(2, *teacher.latent_shape(), generator=torch.Generator().manual_seed(0))
    trainer = under_training(tmp_path, made, teacher, prompts)
    start = {k: p.detach().clone() for k, p in made.student.parameters.items()}
    fake = [seen_at(made.fake_score.denoiser, prompts, x)]
    after = {6: 4, 7: 4, 8: 2, 9: 2, 10: 0, 11: 0}  # updates that made the target of an iteration
    for i in range(12):
        trainer.step(i)
        fake.append(seen_at(made.fake_score.denoiser, prompts, x))
        still = all(torch.equal(p, start[k]) for k, p in made.student.parameters.items())
        assert still is (i < 6)
        if i >= 6:
            assert torch.equal(seen_at(made.target, prompts, x), fake[after[i]])
    assert not torch.equal(fake[4], fake[2])
    assert not torch.equal(fake[2], fake[0])
    assert not made.path


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_telescoping(kind: str, tmp_path: Path):
    """The steps between neighbours, each asked for anew, add up to teacher less fake score: node N is the fake score."""
    made, teacher, prompts = kinds(tmp_path, kind)
    x = torch.randn(2, *teacher.latent_shape(), generator=torch.Generator().manual_seed(0))
    trainer = under_training(tmp_path, made, teacher, prompts)
    for i in range(6):
        trainer.step(i)
    path = dict(made.path)
    path[3] = {k: made.fake_score.parameters[k].detach().clone() for k in path[1]}

    def at(node: int) -> Tensor:
        made.path = dict(path)
        made.aim(node)
        return seen_at(made.target, prompts, x).double()

    total = sum((at(j) - at(j + 1) for j in range(3)), torch.zeros(()))
    whole = seen_at(teacher, prompts, x).double() - seen_at(made.fake_score.denoiser, prompts, x)
    assert torch.allclose(total, whole, rtol=0, atol=1e-12)
    assert whole.abs().max() > 1e-4


PARTS: list[dict[str, Any]] = [
    {},
    {"fake_guidance_scale": 2.0},
    {"policy": "trajectory", "divergence": "huber_kl", "steps": [2]},
    {"divergence": "sid", "fake_guidance_scale": 2.0, "fake_train_guidance_scale": 2.0},
]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_at_node_n_the_student_learns_nothing(kind: str, parts: dict[str, Any], tmp_path: Path):
    """There target and fake score are one: a gradient of exactly 0, which any guidance but the fake score's would break."""
    made, teacher, prompts = kinds(tmp_path, kind, **parts)
    trainer = under_training(tmp_path, made, teacher, prompts)
    for i in range(6):
        trainer.step(i)
    require_grad(made.roles(), ["student"])
    batch = prompts_of(teacher, prompts)
    draws = made.draw(batch, Rngs(0, 6, range(2)), 6, ["student", "fake_score"])
    found = []
    for scale in (made.scale_at(3, None), 1.5):
        made.path[3] = {k: made.fake_score.parameters[k] for k in made.path[2]}
        made.aim(3)
        draws.scale = scale
        (losses,) = made.loss("student", batch, draws, 6)
        gradients = torch.autograd.grad(
            losses.total, [*made.student.parameters.values()], allow_unused=True, retain_graph=True
        )
        found.append(max(g.abs().max().item() for g in gradients if g is not None))
    assert found[0] == 0
    assert found[1] > 0


@pytest.mark.parametrize("nodes", [0, 1])
def test_without_nodes_it_is_the_plain_method(nodes: int, tmp_path: Path):
    """Bit for bit, weights and what is saved of them; with one node the first target is the teacher, too."""
    found = {}
    settings: dict[str, Any] = {
        **{"steps": [2], "max_train_steps": 8, "train_batch_size": 2, "fake_score_prompt_dropout": 0.1},
        **{"fake_score_warmup_steps": 2, "fake_score_updates": 2},
    }
    for name, own in (("dmd2", {}), ("disback", {"nodes": nodes, "node_steps": 2})):
        teacher = Teacher(PROCESSES["vp"], MEAN, STD)
        made = method(tmp_path, teacher, **settings, **own, method=name, name=name)
        under_training(tmp_path, made, teacher, [str(SHIFT)] * 2).run()
        found[name] = {(n, k): p for n, role in made.roles().items() for k, p in role.parameters.items()}
    assert found["dmd2"].keys() == found["disback"].keys()
    assert all(torch.equal(found["dmd2"][key], p) for key, p in found["disback"].items())


def at_law(made: DistributionMatching, mean: float, std: float) -> None:
    """Make the target a node that is the exact denoiser of N(mean, std^2)."""
    assert isinstance(made, DisBack)
    assert made.moving is not None
    node = {k: p.detach().clone() for k, p in made.moving.parameters.items()}
    node["network.mean"].fill_(mean)
    node["network.log_std"].copy_(torch.tensor(std, dtype=torch.float64).log())
    node["network.gain"].zero_()
    made.path[1] = node
    made.aim(1)


@pytest.mark.parametrize("name", PROCESSES)
def test_an_exact_node_is_the_students_fixed_point(name: str, tmp_path: Path):
    """Node N(mu, P^2), exact scores, v_s^2 = a^2 s^2 + sigma^2, weight 1; student m + k z:

    E d = (m - mu) sigma^2 / v_P^2 and E d z = a^2 sigma^2 k (k^2 - P^2) / (v_k^2 v_P^2), both 0 at the node's law alone.
    """
    mu, spread = -0.3, 0.8
    for x, still in ((Laws(), False), (Laws(b=mu, c=spread), True)):
        made = exact(tmp_path, name, x, **PATH, **{"weight": "none", "guidance_scale": 1.0})
        at_law(made, mu, spread)
        a, s = levels(made)
        v_k, v_p = (a**2 * d**2 + s**2 for d in (x.c, spread))
        mean, slope = moments(made, x)
        if still:
            assert torch.cat([mean, slope]).abs().max() < 1e-12
        else:
            assert_relative(mean, (x.b - mu) * s**2 / v_p)
            assert_relative(slope, a**2 * s**2 * x.c * (x.c**2 - spread**2) / (v_k * v_p))


@pytest.mark.parametrize("name", PROCESSES)
def test_an_implicit_divergence_is_of_the_node(name: str, tmp_path: Path):
    """At node N(mu, P^2), v^2 = a^2 P^2 + s^2, v_k^2 of the student m + k z: SiD's moments with the node in the teacher's place,

    E d = (m - mu) s^4 ((2 alpha - 1) v^2 + 2 (1 - alpha) v_k^2)/(v^4 v_k^2) and
    E d z = 2 a^2 k s^4 (k^2 - P^2)(alpha v^2 + (1 - alpha) v_k^2)/(v^4 v_k^4); SIM's, squared, are twice those at alpha 1.
    """
    mu, spread, x = -0.3, 0.8, Laws()
    for own, alpha, factor in (({"divergence": "sid", "sid_alpha": 0.7}, 0.7, 1), ({"divergence": "sim"}, 1, 2)):
        parts = {"weight": "none", "guidance_scale": 1.0, "distance": "squared"}
        made = exact(tmp_path, name, x, **PATH, **parts, **own)
        at_law(made, mu, spread)
        a, s = levels(made)
        v_k, v = (a**2 * d**2 + s**2 for d in (x.c, spread))
        mean, slope = moments(made, x)
        wanted = (x.b - mu) * s**4 * ((2 * alpha - 1) * v + 2 * (1 - alpha) * v_k) / (v**2 * v_k)
        assert_relative(mean, factor * wanted)
        wanted = 2 * a**2 * x.c * s**4 * (x.c**2 - spread**2) * (alpha * v + (1 - alpha) * v_k) / (v**2 * v_k**2)
        assert_relative(slope, factor * wanted)


@pytest.mark.parametrize("divergence", ["reverse_kl", "sid"])
def test_the_walk_ends_at_the_guided_teachers_law(divergence: str, tmp_path: Path):
    """Along three nodes by Trainer, within 8% of a deviation, as without a path."""
    teacher = Teacher(PROCESSES["flow"], MEAN, STD)
    settings = {
        **{"divergence": divergence, "guidance_scale": 2.0, "fake_score_warmup_steps": 60, "node_steps": 20},
        **{"train_batch_size": 8, "max_train_steps": 350, "lr_scheduler": "cosine", "fake_score_prompt_dropout": 0.0},
        **{"learning_rate": 0.02, "fake_score_learning_rate": 0.03, "adam_beta1": 0.0, "adam_beta2": 0.95},
        **{"logging_steps": 1000, "checkpointing_steps": 1000},
    }
    made = method(tmp_path, teacher, **(PATH | settings))
    under_training(tmp_path, made, teacher, [str(SHIFT)]).run()
    ((found, deviation),) = laws(made, 1, str(SHIFT))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    assert ((found - mean - 2 * SHIFT).abs() / std).max() < 0.08
    assert (deviation / std - 1).abs().max() < 0.08


def test_the_path_leads_to_the_students_law(tmp_path: Path):
    """Its end is the Tweedie denoiser of the initial student, m + a k^2 / v_k^2 (x_t - a m); each node is nearer than the last.

    Within a tenth of the teacher's distance: twice what Adam's steps of 0.02 keep it away.
    """
    teacher = Teacher(PROCESSES["flow"], MEAN, STD)
    settings = {**PATH, "fake_score_warmup_steps": 150, "path_share": 0.95, "max_train_steps": 200}
    own = {"learning_rate": 0.02, "fake_score_prompt_dropout": 0.0, "train_batch_size": 8}
    made = method(tmp_path, teacher, **(settings | own))
    with torch.no_grad():  # of the teacher's one call from noise, a constant, make a law with k = 0.4
        made.student.denoiser.network.scale -= 0.4
    trainer = under_training(tmp_path, made, teacher, [str(SHIFT)])
    ((m, k),) = laws(made, 1, str(SHIFT))
    for i in range(150):
        trainer.step(i)
    path = dict(made.path)

    def off(denoiser: Denoiser) -> float:
        found = 0.0
        for level in (0.3, 0.5, 0.8):
            gain, offset = affine(denoiser, level, str(SHIFT))
            a, s = 1 - level, level
            wanted = a * k**2 / (a**2 * k**2 + s**2)
            found += ((gain - wanted).abs() + (offset - m * (1 - wanted * a)).abs()).sum().item()
        return found

    gaps = [off(teacher)]
    for node in (1, 2):
        made.path = dict(path)
        made.aim(node)
        gaps.append(off(made.target))
    gaps.append(off(made.fake_score.denoiser))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.1 * gaps[0]


def test_when_nodes_are_recorded(tmp_path: Path):
    """At even shares of a way that is gone as 1 - e^(-r n), to `path_share` at the end; with 0 at even iterations."""
    c: Any = config(
        tmp_path,
        **(PATH | {"nodes": 10, "fake_score_warmup_steps": 1000, "path_share": 0.95}) | {"max_train_steps": 2000},
    )
    gone = 1 - torch.exp(torch.tensor(0.05).log() / 1000 * torch.tensor(c.record_steps))
    assert torch.allclose(gone, 0.95 * torch.arange(1, 11) / 10, atol=0.002)  # of a rounded iteration
    assert c.record_steps[-1] == 1000
    warm = c.model_copy(update={"lr_warmup_steps": 500})
    moved = torch.cumsum(torch.arange(1, 1001).clamp(max=500) / 500, 0)[torch.tensor(warm.record_steps) - 1]
    gone = 1 - torch.exp(torch.tensor(0.05).log() / moved[-1] * moved)
    assert torch.allclose(gone, 0.95 * torch.arange(1, 11) / 10, atol=0.002)
    assert config(tmp_path, **PATH).record_steps == [2, 4, 6]  # type: ignore[attr-defined]
    assert [config(tmp_path, **PATH).node(i) for i in range(12)] == [2] * 8 + [1] * 2 + [0] * 2  # type: ignore[attr-defined]


def test_guidance_grows_along_the_path(tmp_path: Path):
    """f + (g - f)(1 - j / N), f of the fake score, here 1, also where g is drawn for each row; a network that is told the scale is told one throughout."""
    made, teacher, prompts = kinds(tmp_path, "full", guidance_scale=7.0)
    assert [made.scale_at(j, None) for j in (3, 2, 1)] == pytest.approx([1, 3, 5])
    assert made.scale_at(0, None) is None
    rows = made.scale_at(1, torch.tensor([4.0, 7.0]))
    assert isinstance(rows, Tensor)
    assert rows.tolist() == pytest.approx([3, 5])
    trainer = under_training(tmp_path, made, teacher, prompts)
    found = []
    for i in range(12):
        draws = made.draw(prompts_of(teacher, prompts), Rngs(0, i, range(2)), i, made.updates(i))
        found.append(draws.scale)
        trainer.step(i)
    assert found == pytest.approx([None] * 6 + [3, 3, 5, 5, None, None])
    both, _, _ = kinds(tmp_path, "full", guidance_scale=7.0, fake_guidance_scale=4.0)
    assert [both.scale_at(j, None) for j in (3, 2, 1)] == pytest.approx([4, 5, 6])
    told = method(tmp_path, Teacher(PROCESSES["flow"], MEAN, STD, guided=0.0), **PATH)
    assert told.scale_at(1, None) is None


def test_a_discriminator_does_not_bend_the_path(tmp_path: Path):
    """It is trained, and in the checkpoint, but not while nodes are recorded, and it is in none."""
    made, _, _ = kinds(tmp_path, "lora", gan_weight=0.1, train_data="in memory")
    batch = prompts_of(made.teacher.denoiser, PROMPTS)
    batch.x0 = torch.zeros(2, *batch.shape)
    for i, count in ((5, 1), (6, 2)):
        draws = made.draw(batch, Rngs(0, i, range(2)), i, ["fake_score"])
        assert len(list(made.loss("fake_score", batch, draws, i))) == count
    made.record(4)
    assert made.moving is not None
    assert made.path[2].keys() == made.moving.parameters.keys() < made.fake_score.parameters.keys()


@pytest.mark.parametrize("divergence", ["reverse_kl", "sid"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_cost_is_as_declared(kind: str, divergence: str, tmp_path: Path):
    """Recording is the student and the fake score alone; then a node's calls stand in the place of the teacher's."""
    made, teacher, prompts = kinds(tmp_path, kind, divergence=divergence)
    trainer = under_training(tmp_path, made, teacher, prompts)
    asked = {6: "target", 7: "target", 8: "target", 9: "target", 10: "teacher", 11: "teacher"}
    for i in range(12):
        with calls(made) as seen:
            trainer.step(i)
        is_as_declared(made, i, seen)
        assert {c.role for c in seen} == {"student", "fake_score"} | ({asked[i]} if i in asked else set())


def test_memory_counts_the_target(tmp_path: Path):
    """One more copy of the weights than the plain method's; nodes lie in main memory."""
    needs = {}
    for name, own in (("dmd2", {}), ("disback", PATH)):
        made = lora(tmp_path, tiny_stable_diffusion(), **{**own, "method": name, "steps": [1], "fake_score_updates": 1})
        needs[name] = memory.need(made.config, made, made.teacher.denoiser, False)
        one = 4 * sum(p.numel() for p in made.student.parameters.values())
    assert needs["disback"].weights - needs["dmd2"].weights == one
    assert needs["disback"].optimizer == needs["dmd2"].optimizer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "phases"}, "nodes 3: not with policy phases: a path is of one network"),
        (
            {"policy": "trajectory", "step_conditioned": True},
            "nodes 3: not with step_conditioned: a target is told no number of a step",
        ),
        (
            {"fake_score_warmup_steps": 2},
            "fake_score_warmup_steps 2 are too few to record them; take more, or fewer nodes",
        ),
        (
            {"fake_score_warmup_steps": 4, "path_share": 0.99, "max_train_steps": 40},
            "fake_score_warmup_steps 4 are too few to record them after 0, 1, 4 iterations",
        ),
        ({"max_train_steps": 10}, "the teacher is the target from iteration 10, and max_train_steps is 10"),
        (
            {"divergence": "f_distill", "gan_warmup_steps": 9},
            "gan_warmup_steps 9: f_distill's ratio is of the teacher, which is the target from iteration 10; give at least",
        ),
        (
            {"regression_weight": 1.0, "regression_warmup_steps": 3},
            "not with regression_warmup_steps: the path is recorded from the run's beginning",
        ),
        ({"divergence": "uni_instruct"}, "gan_warmup_steps 0: uni_instruct's ratio is of the teacher"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **(PATH | changes))
    config(tmp_path, **(PATH | changes | {"nodes": 0}))


def test_reverse_kl_waits_for_no_ratio(tmp_path: Path):
    config(tmp_path, **PATH, divergence="uni_instruct", f="rkl")
