"""What SDXL is told of images: their own sizes and crops where it learns from them, the sample's size where it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Batch, Distiller
from fewstep.distill.random import Rngs
from fewstep.distill.run import methods_distiller, networks_of
from fewstep.samplers.condition import concatenate
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.distill.runs import config
from tests.pipelines import PROMPTS
from tests.pipelines_large import tiny_stable_diffusion_xl

SHAPE = (4, 8, 8)
OWN = (16, 16, 0, 0, 16, 16)
SIZES = torch.tensor([[96, 64, 8, 0, 16, 16], [30, 40, 0, 2, 16, 16]])
GAN = {"gan_weight": 0.01, "discriminator_weight": 0.01, "gan_warmup_steps": 0, "fake_score_updates": 1}
METHODS: dict[str, dict[str, Any]] = {
    "pretrain": {"prompt_dropout": 0.5},
    "lcm": {"guidance_scale": 3.0},
    "dmd2": {"guidance_scale": 3.0, "steps": [2], **GAN},
}


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    return denoiser_of(tiny_stable_diffusion_xl())


def made(teacher: Denoiser, folder: Path, name: str, **changes: Any) -> tuple[TrainConfig, Distiller]:
    settings = config(folder, method=name, student="full", **(METHODS[name] | changes))
    return settings, methods_distiller(settings, networks_of(settings, teacher))


def batch(teacher: Denoiser, size_ids: Tensor | None) -> Batch:
    return Batch(PROMPTS, SHAPE, teacher.encode(PROMPTS), randn((2, *SHAPE), generators([5, 6])), size_ids)


@contextmanager
def told(method: Distiller) -> Iterator[list[list[tuple[float, ...]]]]:
    """`time_ids` of each call of any role's network, a list of rows."""
    seen: list[list[tuple[float, ...]]] = []
    handles = [
        network.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([tuple(r) for r in kwargs["added_cond_kwargs"]["time_ids"].tolist()]),
            with_kwargs=True,
        )
        for role in method.roles().values()
        for network in role.denoiser.networks.values()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def losses(method: Distiller, rows: Batch) -> dict[str, float]:
    """Of an iteration in which every role steps, before any step."""
    roles = method.updates(0)
    draws = method.draw(rows, Rngs(0, 0, range(2)), 0, roles)
    return {role: sum(part.total.item() for part in method.loss(role, rows, draws, 0)) for role in roles}


@pytest.mark.parametrize("name", ["pretrain", "lcm"])
def test_what_learns_from_images_is_told_their_sizes(teacher: Denoiser, tmp_path: Path, name: str):
    """Every call, with and without the prompt; and it matters. Without sizes it is the sample's own."""
    _, method = made(teacher, tmp_path, name)
    with told(method) as seen:
        cropped = losses(method, batch(teacher, SIZES))
    rows = [tuple(map(float, r)) for r in SIZES.tolist()]
    assert seen
    assert all(call == rows * (len(call) // 2) for call in seen)
    assert {len(call) for call in seen} == ({2} if name == "pretrain" else {2, 4})  # lcm's teacher is guided
    with told(method) as seen:
        plain = losses(method, batch(teacher, None))
    assert {r for call in seen for r in call} == {OWN}
    assert losses(method, batch(teacher, torch.tensor([OWN] * 2))) == plain
    other = SIZES.clone()
    other[0, 0] = 200
    again = losses(method, batch(teacher, other))
    for role in plain:
        assert abs(cropped[role] / plain[role] - 1) > 1e-3
        assert abs(cropped[role] / again[role] - 1) > 1e-4


def test_a_gan_tells_real_images_and_samples_the_same(teacher: Denoiser, tmp_path: Path):
    """Else its discriminator would know one from the other without a look. Samples are of their own size anyway."""
    _, method = made(teacher, tmp_path, "dmd2")
    assert method.updates(0) == ["student", "fake_score"]
    with told(method) as seen:
        both = losses(method, batch(teacher, SIZES))
    assert {r for call in seen for r in call} == {OWN}
    assert 4 in {len(call) for call in seen}  # fakes and real images
    assert both == losses(method, batch(teacher, None))


def test_a_text_encoder_that_trains_is_told_them_too(teacher: Denoiser, tmp_path: Path):
    """There conditions are made in the iteration, not read."""
    _, method = made(teacher, tmp_path, "pretrain")
    rows = batch(teacher, SIZES)
    rows.condition = None
    with told(method) as seen:
        losses(method, rows)
    assert seen == [[tuple(map(float, r)) for r in SIZES.tolist()]]


def test_a_conditions_sizes_go_with_its_rows(teacher: Denoiser):
    rows = batch(teacher, SIZES).of_images
    assert rows is not None
    assert rows[[1]].sizes is not None
    assert torch.equal(rows[[1]].sizes, SIZES[1:])  # type: ignore[arg-type]
    both = concatenate([rows.unconditional(), rows])
    assert torch.equal(both.sizes, torch.cat([SIZES, SIZES]))  # type: ignore[arg-type]
    assert torch.equal(both.to("cpu")[2:].sizes, SIZES)  # type: ignore[arg-type]
    assert rows.with_guidance(2.0).sizes is SIZES
