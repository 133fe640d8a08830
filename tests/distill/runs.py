"""Small runs: a Gaussian teacher under the real trainer, images on disk, and a method whose every number is scripted."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.distill.batches import Batches
from fewstep.distill.config import TrainConfig, validate
from fewstep.distill.data import Prompts
from fewstep.distill.distiller import Distiller, Losses, Role
from fewstep.distill.record import Record
from fewstep.distill.trainer import Trainer
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.plan import SamplingPlan, uniform_plan


def config(folder: Path, **changes: Any) -> TrainConfig:
    """A checked config of a short run under `folder`."""
    base = {
        **{"method": "pretrain", "teacher": "in memory", "train_data": "in memory", "output_dir": str(folder)},
        **{"max_train_steps": 6, "train_batch_size": 4, "learning_rate": 0.01, "rank": 4, "name": "run"},
        **{"logging_steps": 1, "checkpointing_steps": 2, "cache_dir": str(folder / "cache")},
    }
    return validate(base | changes)


def trainer(config: TrainConfig, method: Distiller, x0: Tensor, condition: Condition, resume: bool = False) -> Trainer:
    """A trainer of a method on given latents, one condition each, as `train` would make it."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=True)
    record = Record(config, accelerator)
    record.open(resume)
    batches = Batches(
        Prompts([str(i) for i in range(len(x0))]),
        tuple(x0.shape[1:]),
        condition,
        x0,
        config.seed,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    made = Trainer(config, accelerator, method, batches, record)
    if resume:
        made.resume()
    return made


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without the seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def halved(run: Path, to: Path) -> None:
    """A run as it was after two of its four iterations."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints/step-000004")
    shutil.rmtree(to / "student")


def assert_one(one: Path, other: Path) -> None:
    """Two runs of four iterations are one: every tensor of the last checkpoint, and every scalar.

    Each sample has its draws whoever holds it, so that only the order of float32 sums differs: 1e-7 of a gradient, some
    1e-5 of an update of 0.01 in each of four steps.
    """
    start, ours, theirs = (
        {p.name: load_file(p) for p in (run / "checkpoints" / step).glob("*.safetensors")}
        for run, step in ((one, "step-000002"), (one, "step-000004"), (other, "step-000004"))
    )
    assert ours.keys() == theirs.keys()
    assert {"student.safetensors", "optimizer-student.safetensors", "average.safetensors"} <= ours.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        counts = {k: v for k, v in tensors.items() if k.endswith(".step")}  # of the optimiser
        assert counts == {k: theirs[file][k] for k in counts}
        values = {k: v for k, v in tensors.items() if k not in counts}
        moved = max((v - start[file][k]).abs().max().item() for k, v in values.items())
        assert moved > 0
        assert max((v - theirs[file][k]).abs().max().item() for k, v in values.items()) < 1e-3 * moved, file
    for a, b in zip(*(metrics(run) for run in (one, other)), strict=True):
        means = a.keys() - {"student/spread"}  # that one is of the rows of a micro-batch together
        assert {k: a[k] for k in means} == pytest.approx({k: b[k] for k in means}, rel=1e-3, abs=1e-6)


def killed_in_second(monkeypatch: pytest.MonkeyPatch, denoiser: Denoiser) -> list[int]:
    """Interrupt the second of the denoiser's calls that encode; rows of each, as they come."""
    encode, rows = denoiser.to_latents, list[int]()

    def killed(batch: Tensor) -> Tensor:
        rows.append(len(batch))
        if len(rows) == 2:
            raise KeyboardInterrupt
        return encode(batch)

    monkeypatch.setattr(denoiser, "to_latents", killed)
    return rows


def write_images(folder: Path, n: int = 6, side: int = 16) -> Path:
    """n pictures of noise with captions."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {i}\n")
    return folder


CODECS = {".webm": "libvpx", ".mpg": "mpeg2video", ".ts": "mpeg2video", ".wmv": "wmv2", ".flv": "flv"}


def write_clip(path: Path, levels: Sequence[float], fps: float = 16, size: tuple[int, int] = (64, 64)) -> Path:
    """A video whose frames are of one grey each, levels of 255, with H.264 or what else the suffix asks for."""
    import imageio_ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    codec = CODECS.get(path.suffix)
    given = {"codec": codec} if codec else {"output_params": ["-preset", "ultrafast"]}
    writer = imageio_ffmpeg.write_frames(
        str(path), size[::-1], fps=fps, quality=9, macro_block_size=2, ffmpeg_log_level="error", **given
    )
    writer.send(None)
    for level in levels:
        writer.send(np.full((*size, 3), round(level), np.uint8))
    writer.close()
    return path


def write_clips(folder: Path, captions: Sequence[str], frames: int = 5) -> Path:
    """A video of 64x64 pixels for each caption, brighter from frame to frame."""
    for i, caption in enumerate(captions):
        write_clip(folder / f"{i}.mp4", [20 * i + 30 * f for f in range(frames)])
        (folder / f"{i}.txt").write_text(caption)
    return folder


@dataclass
class Scripted(Distiller):
    """Two weights a role; the loss of a role is `losses[role](weights, micro-batch's draws, iteration)`.

    `log` notes what the trainer asks for, in order.
    """

    losses: dict[str, Callable[[Tensor, Tensor, int], Tensor]]
    every: dict[str, int] = field(default_factory=dict)
    log: list[tuple] = field(default_factory=list)
    memory: float = 0.0

    def __post_init__(self) -> None:
        start = torch.tensor([1.0, 2.0])
        self.weights = {name: nn.Parameter(start.clone()) for name in self.losses}
        self._roles = {n: Role(SimpleNamespace(), {"w": w}) for n, w in self.weights.items()}  # type: ignore[arg-type]

    def roles(self) -> dict[str, Role]:
        return self._roles

    def updates(self, iteration: int) -> list[str]:
        return [name for name in self.losses if iteration % self.every.get(name, 1) == 0]

    def draw(self, batch: Any, rng: Any, iteration: int, roles: list[str]) -> Tensor:
        self.log.append(("draw", iteration, tuple(rng.indices), tuple(roles)))
        return rng.normal("x", (2,))

    def loss(self, role: str, batch: Any, draws: Tensor, iteration: int) -> Iterator[Losses]:
        self.log.append(("loss", iteration, role))
        total = self.losses[role](self.weights[role], draws, iteration)
        yield Losses(total, {"loss": total.detach()})

    def after_step(self, role: str, iteration: int, scalars: dict[str, float]) -> None:
        self.log.append(("after_step", iteration, role, scalars))
        self.memory += scalars["loss"]

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]

    def plan(self, steps: int) -> SamplingPlan:
        return uniform_plan(steps)

    @property
    def step_counts(self) -> tuple[int, ...]:
        return (1,)

    def forwards(self) -> dict[str, dict[str, float]]:
        return {}


def square(weights: Tensor, draws: Tensor, iteration: int) -> Tensor:
    """Mean |w - x|^2."""
    return (weights - draws).square().mean()


def bad(kind: str, at: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A loss whose value, or whose gradient alone, is not finite in one iteration."""

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        if iteration != at:
            return square(w, draws, iteration)
        return w.sum() * math.nan if kind == "loss" else (w.sum() * 0).sqrt()

    return loss


def scripted(folder: Path, distiller: Scripted, resume: bool = False, **changes: Any) -> Trainer:
    """A trainer of a scripted method; its batches hold nothing."""
    x0 = torch.zeros(3, 1)
    return trainer(config(folder, **changes), distiller, x0, Condition({}, 3), resume)
