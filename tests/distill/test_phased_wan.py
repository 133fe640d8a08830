"""Phased DMD on Wan 2.2's two transformers: phases end at its boundary, at any shift, and plain diffusers switches there, too."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distill.config import ConfigError
from fewstep.distill.distiller import Batch
from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.random import Rngs
from fewstep.distill.run import networks_of, train
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators, sample
from fewstep.samplers.stock import stock
from tests.distill.gaussian import under_training
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_wan
from tests.samplers.students import CLIP

ROLES = ["student", "fake_score"]
SIZE = {"height": 64, "width": 64, "frames": 5}


def phased(folder: Path, pipeline: Any, **changes: Any) -> DistributionMatching:
    settings = config(folder, **({"method": "phased_dmd", "fake_score_updates": 1} | CLIP | changes))
    teacher = denoiser_of(pipeline)
    return DistributionMatching(settings, networks_of(settings, teacher))  # type: ignore[arg-type]


def taken(denoiser: Any, u: torch.Tensor) -> set[str]:
    """Networks asked at levels before the shift."""
    noise = denoiser.noise
    return set(denoiser.sides(noise.model_time(noise.shift(u))))


@pytest.mark.parametrize("second", [{}, {"transformer_2": [None, None]}, {"transformer_2": None}])
def test_full_weights_of_one_transformer_are_refused_before_they_load(second: dict[str, Any], tmp_path: Path):
    """By the index alone, as Wan 2.1 writes it; and where the pipeline is in memory."""
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]} | second
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = (
        r"^config: method phased_dmd: phases of a teacher with one network \(as Wan 2.1\) are LoRAs: set student: lora$"
    )
    settings = {"method": "phased_dmd", "student": "full", "prompts": "embedded:emoji", "train_data": None} | CLIP
    for teacher in (None, denoiser_of(tiny_wan())):
        with pytest.raises(ConfigError, match=said):
            train(config(tmp_path, teacher=str(tmp_path), **settings), teacher=teacher)
    index["transformer_2"] = index["transformer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"transformer/ is missing"):  # which of two comes later
        train(config(tmp_path, teacher=str(tmp_path), **settings))


@pytest.mark.parametrize(
    ("shift", "boundary", "inner"),
    [(3.0, 0.875, (0.9444, 0.6176)), (7.0, 0.875, (0.9545, 0.7)), (9.0, 0.9, (0.9643, 0.75)), (12.0, 0.875, None)],
)
def test_two_steps_each_meet_at_the_boundary(
    shift: float, boundary: float, inner: tuple[float, float] | None, tmp_path: Path
):
    """The published levels at shift 7 (T2V) and 9 (I2V); at 3, u = 0.7 is the boundary, 0.85 and 0.35 lie halfway.

    A level on the boundary itself would be the first transformer's, as the pipeline compares. Plain diffusers, in its own
    float32, goes through the same levels by the same transformers, to the same latents.
    """
    pipe = tiny_wan(two_transformers=True, boundary_ratio=boundary, flow_shift=shift)
    made = phased(tmp_path, pipe)
    student, plan = made.student.denoiser, made.plan(4)
    t = made.noise.shift(torch.tensor(plan.levels).double())
    assert 0 < boundary - t[2].item() < 2e-5
    if inner is not None:
        assert t[[1, 3]].tolist() == pytest.approx(inner, abs=1e-4)
    high, low = {"transformer"}, {"transformer_2"}
    assert [taken(student, torch.tensor([v])) for v in plan.levels] == [high, high, low, low]
    ours = sample(student, student.encode(PROMPTS), plan, [0, 1], student.latent_shape(**SIZE))

    pipe.scheduler, calls = stock(student, {4: plan})
    called: list[tuple[str, float]] = []

    def noted(name: str, *args: Any) -> None:
        called.append((name, float(args[2]["timestep"][0])))

    handles = [
        getattr(pipe, name).register_forward_pre_hook(partial(noted, name), with_kwargs=True)
        for name in ("transformer", "transformer_2")
    ]
    pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, **calls[4].set_timesteps)
    theirs = pipe(PROMPTS, **CLIP, **calls[4].arguments, generator=generators([0, 1]), output_type="latent").frames
    for handle in handles:
        handle.remove()
    assert [name for name, _ in called] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert [time for _, time in called] == pytest.approx((1000 * t).tolist(), abs=2e-3)
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("order", ["sequential", "alternating"])
def test_a_phase_reaches_its_own_networks_alone(order: str, kind: str, tmp_path: Path):
    """Of the fake score and, through the optimiser, of the student: the second phase begins from the teacher's weights.

    All levels of a phase's loss, the least and the greatest that can be drawn, too, are its network's, the teacher's as well.
    """
    made = phased(
        tmp_path, tiny_wan(two_transformers=True, boundary_ratio=0.875), student=kind, phase_order=order,
        max_train_steps=4, train_batch_size=8, guidance_scale=1.0, level_margin=0.0, learning_rate=0.01,
    )  # fmt: skip
    assert made.teacher.denoiser.boundaries == (0.875,)
    turns = ["transformer", "transformer", "transformer_2", "transformer_2"]
    if order == "alternating":
        turns = ["transformer", "transformer_2"] * 2
    teacher, small = made.teacher.denoiser, (4, 2, 4, 4)
    batch = Batch([PROMPTS[0]] * 48, small, teacher.encode([PROMPTS[0]] * 48))
    for i, network in enumerate(turns):
        draws = made.draw(batch, Rngs(0, i, range(48)), i, ROLES)
        for role in ROLES:
            point = draws.point
            assert point is not None
            at = torch.cat(
                [made.noise.unshift(draws.t[role]), point.level(torch.zeros(48)), point.level(torch.ones(48))]
            )
            assert taken(made.fake_score.denoiser, at) == taken(teacher, at) == {network}
            assert (draws.t[role] > point.s).all()
    trainer = under_training(tmp_path, made, teacher, [PROMPTS[0]] * 8, torch.zeros(8, *small))
    start = {role: {k: p.detach().clone() for k, p in made.roles()[role].parameters.items()} for role in ROLES}
    trained: set[str] = set()
    for i, network in enumerate(turns):
        before = {role: {k: p.detach().clone() for k, p in made.roles()[role].parameters.items()} for role in ROLES}
        trainer.step(i)
        trained.add(network)
        for role in ROLES:
            now = made.roles()[role].parameters
            moved = {k.partition(".")[0] for k in now if not torch.equal(before[role][k], now[k])}
            assert moved == {network}
            others = [k for k in now if k.partition(".")[0] not in trained]
            assert all(torch.equal(start[role][k], now[k]) for k in others)


def test_networks_without_phases_are_refused(tmp_path: Path):
    """Two transformers of which the pipeline calls one; a boundary so near the top that no level is left above it."""
    with pytest.raises(UserError, match=r"nothing says where one of the teacher's networks ends \(boundary_ratio\)"):
        phased(tmp_path, tiny_wan(two_transformers=True, boundary_ratio=None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no level is left to compare scores in the phase from 1 to 0.97"):
        phased(tmp_path, tiny_wan(two_transformers=True, boundary_ratio=0.99))
