"""Runs that are killed by SIGKILL and resumed: each is a process that really dies, a fork, so that imports are paid once."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.distill import alarm, checkpoint, trainer
from fewstep.distill.batches import Batches
from fewstep.distill.config import TrainConfig
from fewstep.distill.run import train
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config
from tests.pipelines import tiny_stable_diffusion

SETTINGS: dict[str, Any] = {
    **{"max_train_steps": 8, "train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpointing_steps": 2},
    **{"lr_scheduler": "cosine", "lr_warmup_steps": 3, "ema_decay": 0.9, "best_metric": "student/loss"},
    "preflight": False,
}
PATH: dict[str, Any] = {  # recorded until iteration 3; node 2 from there, node 1 from 5, the teacher in 7
    **{"nodes": 3, "node_steps": 2, "fake_score_warmup_steps": 3, "path_share": 0.0, "fake_score_updates": 2},
}
EXTRA: dict[str, dict[str, Any]] = {
    # dropout draws from torch's own generator
    "pretrain-full": {"train_text_encoder": True, "snr_gamma": 5.0, "step_counts": [4]},
    "lcm-full": {"steps": [1, 2], "mixed_precision": "bf16"},
    "dmd2-lora": {
        **{"steps": [1, 2], "fake_score_updates": 2, "fake_score_learning_rate": 0.02, "preflight": True},
        **{"gan_weight": 0.1, "discriminator_features": "teacher"},
    },
    "disback-full": {**PATH, "policy": "trajectory", "divergence": "huber_kl", "steps": [2], "fake_score": "lora"},
    # the second phase begins in iteration 4
    "phased_dmd-lora": {"steps": [2], "fake_score_updates": 2, "fake_score_warmup_steps": 1},
    "dmd-lora": {"num_pairs": 5, "pair_steps": 2, "regression_metric": "pseudo_huber", "regression_weight": 2.0},
}


def run(teacher: Denoiser, folder: Path, name: str, resume: bool, dies: Callable[[], None]) -> int:
    """Train in a child process; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            dies()
            method, kind = name.split("-")
            images = str(folder.parent.parent / "images")
            train(
                config(folder, method=method, student=kind, train_data=images, **(SETTINGS | EXTRA[name])),
                resume=resume,
                teacher=teacher,
            )
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lives() -> None:
    """Dies nowhere."""


def inside_an_accumulation() -> None:
    """In iteration 3 (the fourth), between its two micro-batches."""
    real = Batches.__call__

    def called(self: Batches, iteration: int, micro: int) -> Any:
        if (iteration, micro) == (3, 1):
            die()
        return real(self, iteration, micro)

    Batches.__call__ = called  # type: ignore[method-assign]


def during_a_save() -> None:
    """Of the checkpoint of iteration 4, after the first file."""
    real, calls = checkpoint.save_file, []

    def saved(tensors: Any, path: Path) -> None:
        if path.parent.name == ".step-000004.partial" and calls:
            path.write_bytes(b"half")
            die()
        calls.append(path)
        real(tensors, path)

    checkpoint.save_file = saved


def in_mid_iteration() -> None:
    """In iteration 6, when a role's optimiser has stepped and its averages have not followed."""
    real, calls = TrainConfig.rate, []

    def rate(c: TrainConfig, iteration: int) -> float:
        if iteration == 6:
            calls.append(iteration)
            optimizer = next(iter(trainers[0].optimizers.values()))
            step = optimizer.step
            optimizer.step = lambda: (step(), die())
        return real(c, iteration)

    trainers: list[trainer.Trainer] = []
    make = trainer.Trainer.__init__

    def made(self: trainer.Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        trainers.append(self)

    trainer.Trainer.__init__ = made  # type: ignore[method-assign]
    TrainConfig.rate = rate  # type: ignore[method-assign]


def tear(checkpoints: Path) -> None:
    """Cut the newest checkpoint's weights short."""
    newest = checkpoint.iterations(checkpoints)[-1]
    file = newest / "student.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def main(folder: Path, names: list[str]) -> None:
    """All runs of the named combinations, for a process of its own, whose patches stay in it.

    Writes folder/METHOD-KIND/{straight,killed}/run and the exit codes of all runs as folder/METHOD-KIND/codes.json.
    """
    alarm.BUDGET, alarm.SHARE = 1.0, 1e-6  # samples are looked at every few iterations, and nothing is made of it
    pipeline = tiny_stable_diffusion()
    pipeline.text_encoder.config.attention_dropout = 0.2
    for module in pipeline.text_encoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.2
    teacher = denoiser_of(pipeline)
    for name in names:
        straight, killed = folder / name / "straight", folder / name / "killed"
        straight.mkdir(parents=True)
        killed.mkdir()
        codes = [run(teacher, straight, name, False, lives)]
        codes.append(run(teacher, killed, name, False, inside_an_accumulation))
        codes.append(run(teacher, killed, name, True, during_a_save))
        codes.append(run(teacher, killed, name, True, in_mid_iteration))
        tear(killed / "run/checkpoints")
        codes.append(run(teacher, killed, name, True, lives))
        (folder / name / "codes.json").write_text(json.dumps(codes))
