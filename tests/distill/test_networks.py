"""Roles: one base in memory for all adapters, gradients for the one that steps, and moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill import networks as roles_of_a_run
from fewstep.distill.distiller import Role
from fewstep.distill.networks import Networks, average_gradients, require_grad, swapped, update_average
from fewstep.samplers.adapters import activate, bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion, tiny_wan

KINDS = ("lora", "full", "beside")


def perturb(role: Role, seed: int) -> None:
    """Moves every parameter: at B = 0 every LoRA role would equal the teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def ask(denoiser: Denoiser) -> Tensor:
    """A prediction at fixed inputs."""
    x = torch.randn(2, *denoiser.latent_shape(), generator=torch.Generator().manual_seed(3))
    return denoiser.predict(x, torch.tensor([0.7, 0.3]), denoiser.encode(["a cat", "a dog"], ""))


def networks(kind: str, teacher: Denoiser | None = None) -> Networks:
    """`beside`: a full student, and LoRAs for the others."""
    mixed, of = kind == "beside", teacher or denoiser_of(tiny_stable_diffusion())
    return Networks(of, "full" if mixed else kind, rank=4, beside="lora" if mixed else None)


def three(kind: str) -> dict[str, Role]:
    """Teacher, student and fake score, the last two moved away."""
    made = networks(kind)
    roles = {"teacher": made.teacher(), "student": made.trained("student"), "fake_score": made.trained("fake_score")}
    perturb(roles["student"], 1)
    perturb(roles["fake_score"], 2)
    return roles


def test_lora_roles_share_one_base_in_memory():
    teacher = denoiser_of(tiny_stable_diffusion())
    before = {p.data_ptr(): p.numel() for p in teacher.network.parameters()}
    made = Networks(teacher, "lora", rank=4)
    roles = [made.teacher(), made.trained("student"), made.trained("fake_score"), made.average("student", 0.9)]
    adapters = [{p.data_ptr() for p in role.parameters.values()} for role in roles]
    assert len(set().union(*adapters)) == sum(map(len, adapters)) == 3 * len(adapters[1])
    for role in roles:
        module = bare(role.denoiser.network)
        assert {p.data_ptr() for p in module.parameters()} == set(before).union(*adapters)


@pytest.mark.parametrize(("alpha", "factor"), [(8.0, 2), (None, 1)])
def test_alpha_scales_the_lora(alpha: float | None, factor: int):
    """A layer adds (alpha / rank) B A x, of rank 4; alpha is the rank where none is given."""
    student = Networks(denoiser_of(tiny_stable_diffusion()), "lora", rank=4, alpha=alpha).trained("student")
    perturb(student, 1)
    activate(bare(student.denoiser.network), "student")
    key = next(k for k in student.parameters if k.endswith("to_q.lora_A.weight"))
    down, up = (student.parameters[key.replace("lora_A", half)] for half in ("lora_A", "lora_B"))
    layer: Any = student.denoiser.network.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
    x = torch.randn(3, down.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + factor * x @ down.T @ up.T)


def test_beside_a_full_student_the_fake_score_is_a_lora_of_the_teacher():
    """And so is what follows the fake score; the student's average is full, and no copy takes adapters along."""
    teacher = denoiser_of(tiny_stable_diffusion())
    base = {p.data_ptr() for p in teacher.network.parameters()}
    made = networks("beside", teacher)
    student, fake, target = made.trained("student"), made.trained("fake_score"), made.frozen("target")
    roles = [student, fake, target, made.average("student", 0.9), made.average("fake_score", 0.9)]
    own = [{p.data_ptr() for p in role.parameters.values()} for role in roles]
    assert len(set().union(*own)) == sum(map(len, own))
    assert [role.adapter is not None for role in roles] == [False, True, True, False, True]
    for i in (1, 2, 4):
        assert {p.data_ptr() for p in bare(roles[i].denoiser.network).parameters()} == base.union(
            own[1], own[2], own[4]
        )
    for i in (0, 3):
        assert {p.data_ptr() for p in roles[i].denoiser.network.parameters()} == own[i]
        assert len(own[i]) == len(base)


def test_full_roles_share_nothing():
    made = networks("full")
    roles = [made.teacher(), made.trained("student"), made.trained("fake_score"), made.average("student", 0.9)]
    pointers = [{p.data_ptr() for p in role.denoiser.network.parameters()} for role in roles]
    assert len(set().union(*pointers)) == sum(map(len, pointers))
    for role in roles[1:]:
        assert {id(p) for p in role.parameters.values()} == {id(p) for p in role.denoiser.network.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_roles_start_as_the_teacher_and_then_go_their_own_ways(kind: str):
    """In whatever order they are asked; the teacher's answer never moves, by a bit."""
    plain = denoiser_of(tiny_stable_diffusion())
    with torch.no_grad():
        expected = ask(plain)
        made = networks(kind)
        teacher, student = made.teacher(), made.trained("student")
        assert ask(student.denoiser).equal(expected)
        fake = made.trained("fake_score")
        perturb(student, 1)
        perturb(fake, 2)
        average = made.average("student", 0.9)
        one, other = ask(student.denoiser), ask(fake.denoiser)
        for _ in range(2):
            assert ask(teacher.denoiser).equal(expected)
            assert ask(fake.denoiser).equal(other)
            assert ask(average.denoiser).equal(one)
            assert ask(student.denoiser).equal(one)
    for a, b in ((one, expected), (other, expected), (one, other)):
        assert (a - b).norm() > 0.01 * expected.norm()


def gradients(role: Role) -> dict[str, Tensor]:
    return {k: p.grad for k, p in role.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_survive_what_is_asked_in_between(kind: str):
    """A student's forward; then the fake score trains and the teacher is asked; then the student's backward."""
    alone, roles = three(kind), three(kind)
    require_grad(alone, ["student"])
    ask(alone["student"].denoiser).square().mean().backward()
    expected = gradients(alone["student"])

    require_grad(roles, ["student", "fake_score"])
    kept = ask(roles["student"].denoiser).square().mean()
    require_grad(roles, ["fake_score"])
    ask(roles["fake_score"].denoiser).square().mean().backward()
    ask(roles["teacher"].denoiser)
    assert gradients(roles["student"]) == {}
    of_fake = {k: g.clone() for k, g in gradients(roles["fake_score"]).items()}
    require_grad(roles, ["student"])
    kept.backward()

    got = gradients(roles["student"])
    assert got.keys() == expected.keys() == roles["student"].parameters.keys()
    assert all(got[k].equal(expected[k]) for k in expected)
    assert sum(g.abs().sum() for g in expected.values()) > 0
    assert all(gradients(roles["fake_score"])[k].equal(g) for k, g in of_fake.items())
    adapters = {id(p) for role in roles.values() for p in role.parameters.values()}
    base = [p for p in bare(roles["teacher"].denoiser.network).parameters() if id(p) not in adapters]
    assert base
    assert not any(p.requires_grad or p.grad is not None for p in base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_that_does_not_step_gets_no_gradient(kind: str):
    """The student's loss asks the fake score with a graph, as GAN and score losses may."""
    roles = three(kind)
    require_grad(roles, ["student"])
    (ask(roles["student"].denoiser) - ask(roles["fake_score"].denoiser)).square().mean().backward()
    assert gradients(roles["student"]).keys() == roles["student"].parameters.keys()
    assert gradients(roles["fake_score"]) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_average_follows_its_formula(kind: str):
    """a_n = d^n a_0 + (1 - d) sum_k d^(n - k) p_k, in float64."""
    made, decay = networks(kind), 0.8
    student = made.trained("student")
    perturb(student, 1)
    average = made.average("student", decay)
    assert (average.ema_of, average.ema_decay, average.trained) == ("student", decay, False)
    assert average.parameters.keys() == student.parameters.keys()
    key = next(iter(student.parameters))
    expected = student.parameters[key].detach().double()
    assert average.parameters[key].double().equal(expected)
    for i in range(5):
        perturb(student, 10 + i)
        update_average({k: p.data for k, p in average.parameters.items()}, student.parameters, decay)
        expected = decay * expected + (1 - decay) * student.parameters[key].detach().double()
    torch.testing.assert_close(average.parameters[key].detach().double(), expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        assert not ask(average.denoiser).equal(ask(student.denoiser))


def test_swapped_lends_values_and_gives_them_back():
    """Nothing is copied, and an error inside of the block changes nothing."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    own, value = parameter.data_ptr(), torch.tensor([5.0])

    def inside() -> None:
        with swapped({"a": parameter}, {"a": value}):
            assert parameter.data_ptr() == value.data_ptr()
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert (parameter.data_ptr(), parameter.item(), value.item()) == (own, 1.0, 5.0)
    with swapped({"a": parameter}, None):
        assert parameter.data_ptr() == own


def test_adapters_of_a_half_precision_base_are_float32():
    """The base keeps its type; a step of 1e-4 would be lost in bfloat16."""
    teacher = denoiser_of(tiny_stable_diffusion().to(dtype=torch.bfloat16))
    student = Networks(teacher, "lora", rank=4).trained("student")
    assert {p.dtype for p in student.parameters.values()} == {torch.float32}
    own = {id(p) for p in student.parameters.values()}
    assert {p.dtype for p in bare(student.denoiser.network).parameters() if id(p) not in own} == {torch.bfloat16}
    full = Networks(denoiser_of(tiny_stable_diffusion().to(dtype=torch.bfloat16)), "full").trained("student")
    assert {p.dtype for p in full.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("build", [tiny_ddpm, tiny_wan], ids=lambda f: f.__name__)
def test_every_network_of_a_family_is_adapted(build: Callable[..., object]):
    """Without a loader of adapters (UNet2DModel), and with two transformers (Wan 2.2)."""
    pipeline = build(two_transformers=True) if build is tiny_wan else build()
    teacher = denoiser_of(pipeline)
    student = Networks(teacher, "lora", rank=2).trained("student")
    assert {key.split(".")[0] for key in student.parameters} == set(teacher.networks)
    assert all(".student." not in key and ".lora_" in key for key in student.parameters)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_guidance_input_starts_ignored(scale: float):
    made = networks("full")
    student = made.trained("student", guidance_input=True)
    assert student.denoiser.takes_guidance
    x, t = torch.randn(1, *student.denoiser.latent_shape(), generator=torch.Generator().manual_seed(0)), torch.ones(1)
    condition = student.denoiser.encode(["a cat"])
    with torch.no_grad():
        told = student.denoiser.predict(x, t, condition.with_guidance(scale))
        assert told.equal(made.teacher().denoiser.predict(x, t, condition))
    with pytest.raises(UserError, match="full student"):
        networks("lora").trained("student", guidance_input=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_with_adapters_is_refused(kind: str):
    """Of an earlier run, or of the user: a copy would take them along."""
    teacher = denoiser_of(tiny_stable_diffusion())
    Networks(teacher, "lora", rank=2).trained("student")
    with pytest.raises(UserError, match="unet carries LoRA adapters"):
        networks(kind, teacher)


def test_gradients_are_averaged_where_they_lie(monkeypatch: pytest.MonkeyPatch):
    """In several messages, each into the gradient that is there, in its layout; one that nobody has stays None."""
    sent: list[Tensor] = []
    monkeypatch.setattr(roles_of_a_run, "mean", lambda accelerator, value: sent.append(value) or value / 2)
    monkeypatch.setattr(roles_of_a_run, "MESSAGE", 50)
    shapes = [(4, 3, 2, 2), (7,), (60,), (5,), (3,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters[0].data = parameters[0].data.to(memory_format=torch.channels_last)
    for p in parameters[:4]:
        p.grad = torch.randn_like(p)
    before = [(p.grad, p.grad.clone()) for p in parameters[:4] if p.grad is not None]
    nobody: Any = None  # the message goes nowhere
    average_gradients(nobody, parameters)
    assert [len(value) for value in sent] == [5, 48, 7, 60, 5]
    for p, (own, value) in zip(parameters, before, strict=False):
        assert p.grad is own
        assert torch.equal(own, value / 2)
        assert own.stride() == p.stride()
    assert parameters[4].grad is None
