"""Pairs of the teacher: they are its ODE, made once whatever happens, shared by what shares their causes, drawn by count."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.distill import cache, pairs
from fewstep.distill.batches import Batches
from fewstep.distill.data import Prompts
from fewstep.distill.pairs import StoredPairs, captions_of_pairs, make_pairs, teacher_plan
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators, sample, uniform_plan
from fewstep.samplers.rules import randn
from tests.closed_form import GaussianTeacher
from tests.distill.gaussian import PROCESSES
from tests.distill.runs import config
from tests.pipelines import PROMPTS, tiny_stable_diffusion

SHIFTS = ["0.5", "-1", "0.25", "2"]  # prompts: how far they move the mean


def process(rank: int = 0, world: int = 1, wait: Callable[[], Any] = lambda: None) -> Any:
    """In place of an accelerator."""
    return SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=wait)


def gaussian(name: str = "flow", **changes: Any) -> GaussianTeacher:
    return GaussianTeacher(PROCESSES[name], mean=0.3, std=0.6, shape=(1, 2, 2), **changes)


def made(folder: Path, teacher: Denoiser, at: Any = None, prompts: list[str] = SHIFTS, **changes: Any) -> StoredPairs:
    chosen = {"method": "dmd", "num_pairs": 10, "pair_steps": 2, "guidance_scale": 2.0} | changes
    settings: Any = config(folder, student="full", **chosen)
    condition = teacher.encode(prompts, settings.negative_prompt)
    return make_pairs(settings, teacher, Prompts(prompts), condition, teacher.latent_shape(), at or process())


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the sampler while pairs are made."""
    rows: list[int] = []

    def counted(denoiser: Any, condition: Any, *rest: Any, **named: Any) -> Tensor:
        rows.append(condition.size)
        return sample(denoiser, condition, *rest, **named)

    monkeypatch.setattr(pairs, "sample", counted)
    return rows


@pytest.mark.parametrize("name", PROCESSES)
def test_pairs_are_the_teachers_ode(name: str, tmp_path: Path):
    """At the guided teacher, whose shift is twice the prompt's: from z at the top level exactly where the ODE goes, but for
    an error of the first order, which twice the steps halve; and what plain sampling makes of the same noise.
    """
    teacher, n = gaussian(name), 8
    errors = []
    for steps in (50, 100):
        found = made(tmp_path, teacher, num_pairs=n, pair_steps=steps)
        rows, prompts = found[range(n)], [SHIFTS[c] for c in found.captions]
        shift = 2 * torch.tensor([float(p) for p in prompts]).double().reshape(-1, 1, 1, 1)
        top = torch.ones(n).double()
        start = max(1.0, teacher.noise.sigma(top)[0].item()) * rows["z"].double()
        exact = teacher.exact_ode(start, top, 0 * top, shift)
        errors.append((rows["x"] - exact).abs().max().item())
    assert errors[1] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)
    plan = uniform_plan(100, 2.0, initial_scale=max(1.0, teacher.noise.sigma(torch.ones(())).item()))
    seeds = [pairs.generator("pair", i).initial_seed() for i in range(n)]
    assert torch.equal(rows["z"], randn((n, *teacher.latent_shape()), generators(seeds)))
    # beyond the levels' rounding to a table
    torch.testing.assert_close(rows["x"], sample(teacher, teacher.encode(prompts), plan, seeds), rtol=0, atol=1e-4)


def test_a_scale_that_is_an_input_is_told(tmp_path: Path):
    """In one call: to the network that takes it the guided teacher's shift is its own."""
    told = made(tmp_path, gaussian(guided=1.0), pair_guidance_scale=3.0)[range(10)]
    guided = made(tmp_path, gaussian(), pair_guidance_scale=3.0)[range(10)]
    torch.testing.assert_close(told["x"], guided["x"])
    settings: Any = config(tmp_path, method="dmd", guidance_scale=3.0)
    assert teacher_plan(settings, gaussian(guided=1.0)).nfe == settings.pair_steps


def test_pairs_are_made_in_the_runs_precision(tmp_path: Path):
    """Of a UNet under autocast: the same noise, float32, off by what bfloat16 rounds."""
    teacher, found = denoiser_of(tiny_stable_diffusion()), {}
    for precision in ("no", "bf16"):
        found[precision] = made(tmp_path, teacher, prompts=PROMPTS, mixed_precision=precision)[range(10)]
    assert torch.equal(found["no"]["z"], found["bf16"]["z"])
    assert found["bf16"]["x"].dtype == torch.float32
    off = (found["no"]["x"] - found["bf16"]["x"]).norm() / found["no"]["x"].norm()
    assert 1e-4 < off < 0.05


def test_captions_are_all_drawn_and_few_pairs_are_the_first_of_many():
    data = Prompts([str(i) for i in range(5)])
    few, many = captions_of_pairs(data, 7), captions_of_pairs(data, 15)
    assert many[:7] == few
    assert sorted(many) == sorted(list(range(5)) * 3)
    assert many[:5] != many[5:10]


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch):
    """Three pairs a file: stopped in the third of four, two are kept; a torn one is made again; the same in the end."""
    monkeypatch.setattr(cache, "CHUNK", 3)
    teacher = gaussian()
    whole = made(tmp_path / "other", teacher)[range(10)]
    sampled.clear()
    counted = pairs.sample

    def killed(*arguments: Any, **named: Any) -> Tensor:
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return counted(*arguments, **named)

    monkeypatch.setattr(pairs, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, teacher)
    monkeypatch.setattr(pairs, "sample", counted)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    os.truncate(files[0], files[0].stat().st_size - 1)
    found = made(tmp_path, teacher)
    assert sorted(sampled) == [1, 3, 3, 3, 3]
    assert all(torch.equal(found[range(10)][k], whole[k]) for k in ("z", "x"))
    assert torch.equal(found[[9, 0]]["x"], whole["x"][[9, 0]])


def test_pairs_are_of_their_causes(tmp_path: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch):
    """Whatever changes a pair makes it anew; the run's seed, name, rates and further pairs do not."""
    monkeypatch.setattr(cache, "CHUNK", 5)
    teacher = gaussian()

    def rows(teacher: GaussianTeacher = teacher, **changes: Any) -> int:
        sampled.clear()
        made(tmp_path, teacher, **changes)
        return sum(sampled)

    assert rows() == 10
    assert rows() == 0
    assert rows(seed=7, name="another", learning_rate=1.0, regression_weight=0.5) == 0
    assert rows(num_pairs=15) == 5
    assert rows(pair_steps=3) == 10
    assert rows(guidance_scale=3.0) == 10
    assert rows(guidance_scale=3.0, pair_guidance_scale=2.0) == 0
    assert rows(mixed_precision="bf16") == 10
    assert rows(negative_prompt="1") == 10
    assert rows(prompts=[*SHIFTS[:3], "7"]) > 0
    assert rows(gaussian("flow_shifted")) == 10
    with torch.no_grad():
        teacher.network.mean += 1e-3
    assert rows() == 10


def test_processes_share_the_work(tmp_path: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch):
    """Each file is made once, while the first waits by the second; a process with a disk of its own makes all."""
    monkeypatch.setattr(cache, "CHUNK", 3)
    teacher = gaussian()
    alone = made(tmp_path / "alone", teacher)[range(10)]["x"]
    assert len(sampled) == 4

    def second() -> None:
        assert len(sampled) == 2
        made(tmp_path, teacher, process(1, 2))

    sampled.clear()
    assert torch.equal(made(tmp_path, teacher, process(0, 2, second))[range(10)]["x"], alone)
    assert len(sampled) == 4
    sampled.clear()
    assert torch.equal(made(tmp_path / "its own", teacher, process(1, 2))[range(10)]["x"], alone)
    assert len(sampled) == 4


def test_draws_are_counted(tmp_path: Path):
    """A pair is a function of seed, iteration and row, whoever has the row; it comes with its own prompt; all are drawn."""
    teacher, data = gaussian(), Prompts(SHIFTS)
    found = made(tmp_path, teacher)
    condition = teacher.encode(SHIFTS)

    def batches(rows: int, **where: int) -> Batches:
        return Batches(data, (1, 2, 2), condition, None, 3, rows, pairs=found, **where)

    seen = set()
    for i in range(20):
        batch, _ = batches(4)(i, 0)
        assert batch.pairs is not None
        numbers = [(found[range(10)]["z"] == z).flatten(1).all(1).nonzero().item() for z in batch.pairs.z]
        seen |= set(numbers)
        assert torch.equal(batch.pairs.x, found[numbers]["x"])  # type: ignore[index]
        shifts = [float(SHIFTS[found.captions[n]]) for n in numbers]  # type: ignore[index]
        assert batch.pairs.condition.tensors["shift"].tolist() == shifts
        parts = [batches(1, rank=r, world=2, accumulation=2)(i, m)[0].pairs for m in range(2) for r in range(2)]
        assert torch.equal(torch.cat([p.z for p in parts if p is not None]), batch.pairs.z)
    assert seen == set(range(10))


def test_files_are_made_as_many_at_once_as_a_batch_holds(
    tmp_path: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Three pairs a file: a batch of 7 makes two files in one pass, and of what is missing alone; the pairs are the same."""
    monkeypatch.setattr(cache, "CHUNK", 3)
    teacher = gaussian()
    one = made(tmp_path / "one", teacher, train_batch_size=1)[range(10)]
    sampled.clear()
    many = made(tmp_path / "many", teacher, train_batch_size=7)[range(10)]
    assert sampled == [6, 4]
    assert all(torch.equal(one[k], many[k]) for k in one)
    torn = sorted((tmp_path / "many" / "cache").iterdir())[0]
    rows = len(load_file(torn)["z"])
    os.truncate(torn, torn.stat().st_size - 1)
    sampled.clear()
    again = made(tmp_path / "many", teacher, train_batch_size=7)[range(10)]
    assert sampled == [rows]
    assert all(torch.equal(one[k], again[k]) for k in one)
