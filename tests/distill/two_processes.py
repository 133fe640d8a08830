"""`torchrun ... -m tests.distill.two_processes FOLDER`: what each of two processes does and sees, as FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.distill.alarm import SampleAlarm
from fewstep.distill.console import answer
from fewstep.distill.networks import average_gradients
from fewstep.distill.run import train
from fewstep.distill.trainer import Interrupted
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import Scripted, config, scripted, square
from tests.pipelines import tiny_stable_diffusion

RUNS: dict[str, dict[str, Any]] = {
    "pretrain-lora": {"prompt_dropout": 0.5},
    "dmd-lora": {"regression_metric": "squared", "num_pairs": 6, "pair_steps": 2},
    "dmd2-lora": {"steps": [1, 2], "fake_score_updates": 2},
    "dmd2-full": {"steps": [1, 2], "fake_score_updates": 2},
}
"""By method and kind of student."""
RESUMED = ("dmd2-lora", "dmd2-full")
# a tiny gradient is noise of the order of summation, which AdamW would divide by itself
SAME = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-3, "ema_decay": 0.9}


def settings(folder: Path, where: str, name: str, world: int) -> Any:
    """Four rows a micro-batch, over all processes; one run of each number has the preflight."""
    method, kind = name.split("-")
    return config(
        folder / where,
        **{"method": method, "name": name, "student": kind, "train_data": str(folder / "images")},
        **{"train_batch_size": 4 // world, "cache_dir": str(folder / f"cache-{world}")},
        **{"preflight": name == "pretrain-lora"},
        **SAME,
        **RUNS[name],
    )


def written(folder: Path) -> list[str]:
    """A list that grows with every file below `folder` that this process opens to write, and every folder it makes."""
    seen: list[str] = []

    def hear(event: str, args: tuple[Any, ...]) -> None:
        path = str(args[0]) if args else ""
        if not path.startswith(str(folder)) or "/cache-" in path:  # a cache is written by whoever needs it first
            return
        if (event == "open" and args[1] is not None and set(args[1]) & set("wax+")) or event in (
            "os.mkdir",
            "os.rename",
        ):
            seen.append(f"{event} {path}")

    sys.addaudithook(hear)
    return seen


def outcome(action: Callable[[], Any]) -> str:
    """What a user would read, or "done"."""
    try:
        action()
    except (UserError, Interrupted) as error:
        return str(error)
    return "done"


def only(rank: int, accelerator: Accelerator, act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loss that does something else on one process, in iteration 2."""

    def loss(w: Tensor, draws: Tensor, iteration: int) -> Tensor:
        total = square(w, draws, iteration)
        return act(total) if iteration == 2 and accelerator.process_index == rank else total

    return loss


def signalled(total: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return total


def drawn(rank: int, iteration: int) -> Tensor:
    """Samples that are all alike from iteration 3 on; only the first process may be asked for any."""
    assert rank == 0
    return torch.tensor([[0.0], [float(iteration < 3)]])


def experts(accelerator: Accelerator) -> list[list[float] | None]:
    """Gradients after averaging: of all, of one process alone, of none."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (accelerator.process_index + 1)
    if accelerator.process_index == 1:
        parameters[1].grad = torch.tensor([4.0, 6.0])
    average_gradients(accelerator, parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def threads() -> list[str]:
    """Names of this process's threads that are gloo's."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def main(folder: Path) -> dict[str, Any]:
    """Everything, in one program: starting one is slow."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    found: dict[str, Any] = {"world": accelerator.num_processes, "type": str(accelerator.distributed_type)}
    found["written"] = written(folder)
    for name in RUNS:
        train(settings(folder, "two", name, 2), teacher=denoiser_of(tiny_stable_diffusion()))
    for name in RESUMED:
        train(settings(folder, "there", name, 2), resume=True, teacher=denoiser_of(tiny_stable_diffusion()))
    bad = Scripted({"student": only(1, accelerator, lambda total: total * torch.nan)})
    found["non-finite"] = outcome(scripted(folder, bad, name="bad").run)
    stopped = Scripted({"student": only(1, accelerator, signalled)})
    found["signal"] = outcome(scripted(folder, stopped, name="stopped").run)
    fallen = scripted(folder, Scripted({"student": square}), name="fallen")
    fallen.samples = SampleAlarm(lambda: drawn(rank, fallen.iteration), lambda: drawn(rank, 0), 1, fallen.record)
    found["collapsed"] = outcome(fallen.run)
    resumed = Scripted({"student": square})
    found["resumed"] = outcome(scripted(folder, resumed, name="stopped", resume=True).run)
    found["weights"], found["memory"] = resumed.weights["student"].tolist(), resumed.memory
    found["experts"] = experts(accelerator)
    found["threads within"] = threads()
    return found


if __name__ == "__main__":
    found: dict[str, Any] = {}
    code = answer(lambda: found.update(main(Path(sys.argv[1]))))
    found["threads"] = threads()
    Path(f"{sys.argv[1]}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit(code)
