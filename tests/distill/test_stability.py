"""Runs that are asked too much: they stay finite, or stop with a line and the last good checkpoint; never a silent NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distill import checkpoint
from fewstep.distill.networks import Networks
from fewstep.distill.run import methods_distiller
from fewstep.distill.trainer import Trainer
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import Flow
from tests.closed_form_mixture import MixtureTeacher, ring
from tests.distill.runs import config, metrics, trainer
from tests.distill.test_mixture import SETTINGS, pairs
from tests.distill.test_regression import stored

# what differs from the defaults
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in SETTINGS},
    "dmd": {"method": "dmd", "regression_metric": "pseudo_huber"},
    "dmd2, GAN": {"method": "dmd2", "gan_weight": 5e-3, "train_data": "in memory"},
    "uni_instruct": {"method": "uni_instruct", "gan_warmup_steps": 3},
    "disback": {"method": "disback", "nodes": 2, "node_steps": 4, "fake_score_warmup_steps": 4},
}
STRESS: dict[str, dict[str, Any]] = {
    "rate": {"learning_rate": 0.1, "fake_score_learning_rate": 0.1},  # ten times what such a network takes
    "one row in bf16": {"mixed_precision": "bf16", "train_batch_size": 1},
    "guided": {"guidance_scale": 15.0},
    "unguided": {"guidance_scale": 1.0},
}


def stressed(folder: Path, name: str, **changes: Any) -> Trainer:
    """Twenty iterations of a preset, uni_instruct and one of dmd2 with a discriminator, whose prompts move every mode."""
    settings = {
        **{"student": "full", "max_train_steps": 20, "train_batch_size": 4, "learning_rate": 0.01},
        **{"fake_score_updates": 1, "fake_score_warmup_steps": 2, "checkpointing_steps": 5},
    }
    teacher = MixtureTeacher(Flow(), ring(8, 1.0), 0.25, side=4, boundary=0.501 if name == "phased_dmd" else None)
    made: Any = methods_distiller(config(folder, **(settings | RUNS[name] | changes)), Networks(teacher, "full"))
    data = teacher.draw(8, torch.Generator().manual_seed(0))
    training = trainer(made.config, made, data, teacher.encode([str(i / 8) for i in range(8)]))
    if made.config.regression_weight:
        training.batches.pairs = stored(pairs(made, teacher, 8))
    return training


def stopped(training: Trainer) -> str:
    """Run it; what it said if it stopped."""
    try:
        training.run()
    except UserError as error:
        return str(error)
    return ""


def is_finite(tensors: dict[str, Any]) -> bool:
    return all(bool(v.isfinite().all()) for v in tensors.values())


@pytest.mark.parametrize("stress", STRESS)
@pytest.mark.parametrize("name", RUNS)
def test_finite_or_stopped(name: str, stress: str, tmp_path: Path):
    """To the end with every weight and every logged number finite; else by a line that names the last checkpoint, which is.

    At ten times the rate a run may be ruined without a number that is not finite, and may end either way: it is held
    that no such number is logged or kept. The other settings are ordinary, and run to the end.
    """
    training = stressed(tmp_path, name, **STRESS[stress])
    line = stopped(training)
    if not line:
        assert training.iteration == 20
        assert all(is_finite(role.parameters) for role in training.roles.values())
    assert all(math.isfinite(v) for line in metrics(tmp_path / "run") for v in line.values())
    whole, _ = checkpoint.latest(tmp_path / "run/checkpoints")
    assert whole is not None
    assert int(whole.name.removeprefix("step-")) == training.iteration // 5 * 5
    if line:
        assert f"is not finite; the last good checkpoint is {whole}." in line
        assert stress == "rate"
    groups, _ = checkpoint.load(whole)
    assert all(is_finite(groups[role]) for role in ("student", "fake_score"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_diverges_stops_at_once(name: str, tmp_path: Path):
    """A rate of 1e6, the largest that a config takes: the loss overflows in a few iterations, and nothing later is written."""
    training = stressed(tmp_path, name, learning_rate=1e6, fake_score_learning_rate=1e6, checkpointing_steps=1)
    with pytest.raises(UserError, match=r"iteration \d+: the (loss|gradient) of \w+ is not finite; the last good") as e:
        training.run()
    whole, _ = checkpoint.latest(tmp_path / "run/checkpoints")
    assert whole is not None
    assert f"the last good checkpoint is {whole}. Try a lower learning_rate" in str(e.value)
    assert int(whole.name.removeprefix("step-")) == training.iteration <= 4
    assert is_finite(checkpoint.load(whole)[0]["student"])
