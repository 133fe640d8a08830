"""Memory of DMD2 on the CPU: LoRA roles on one base against full copies, predicted by the planner and measured.

    python benchmarks/memory.py [--iterations 2] [--rank 16] [--markdown FILE]

Each row is a process of its own: a UNet of 70,626,180 random weights beside the embedded teacher's text encoder, batch 1,
iterations in which student and fake score step. Measured is the peak of resident memory above what it was after all
imports (Linux). Prints a table; exit code 1 where the LoRA needs half of the copies' peak or more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = {
    "LoRA on a shared base": {"student": "lora"},
    "LoRA on a shared base, checkpointing": {"student": "lora", "gradient_checkpointing": True},
    "full student, LoRA fake score": {"student": "full", "fake_score": "lora"},
    "full copies": {"student": "full"},
    "full copies, checkpointing": {"student": "full", "gradient_checkpointing": True},
}
MIB = 2**20


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def one(name: str, iterations: int, rank: int) -> dict[str, Any]:
    """Train a few iterations; parameters, predicted and measured bytes."""
    from fewstep.distill.console import quiet

    quiet()
    import torch
    from accelerate import Accelerator
    from diffusers import UNet2DConditionModel

    from fewstep.distill import efficiency
    from fewstep.distill.batches import Batches
    from fewstep.distill.config import validate
    from fewstep.distill.data import Prompts
    from fewstep.distill.memory import need, without_adapters
    from fewstep.distill.record import Record
    from fewstep.distill.run import methods_distiller, networks_of
    from fewstep.distill.trainer import Trainer
    from fewstep.samplers.load import denoiser_of, load_pipeline

    small = load_pipeline("embedded:emoji")  # imports what pipelines import
    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=small.unet.config.in_channels,
        out_channels=small.unet.config.out_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 256, 512),
        cross_attention_dim=small.unet.config.cross_attention_dim,
    )
    small.register_modules(unet=unet)
    teacher = denoiser_of(small)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"method": "dmd2", "teacher": "embedded:emoji", "steps": [1], "fake_score_updates": 1}
        settings |= {"train_batch_size": 1, "rank": rank, "output_dir": folder, "max_train_steps": 1000, **ROWS[name]}
        config = validate(settings)
        accelerator = Accelerator(cpu=True)
        record = Record(config, accelerator)
        record.open(False)
        captions = ["a dog", "a cat"]
        with torch.no_grad():
            condition = teacher.encode(captions)
        method = methods_distiller(config, networks_of(config, teacher))
        efficiency.apply(config, method.roles(), accelerator.device)
        shape = teacher.latent_shape()
        batches = Batches(Prompts(captions), shape, condition, None, 0, 1, 1, 0, 1, accelerator.device)
        trainer = Trainer(config, accelerator, method, batches, record)
        with trainer.attention():
            for i in range(iterations):
                trainer.step(i)
        measured = resident("VmHWM") - baseline
    predicted = need(config, method, teacher, config.gradient_checkpointing, fused=False)
    count = without_adapters(unet)
    assert count >= 50e6
    return {"parameters": count, "predicted": predicted.total, "measured": measured, "threads": torch.get_num_threads()}


def main() -> int:
    """Measure every row, print the table."""
    parser = argparse.ArgumentParser(description="Memory of DMD2, LoRA against full copies.")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--one", choices=ROWS, help="measure this row alone, in this process; print JSON")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(one(a.one, a.iterations, a.rank)))
        return 0
    found: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        command = [sys.executable, __file__, "--one", name, "--iterations", str(a.iterations), "--rank", str(a.rank)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 2
        found[name] = json.loads(done.stdout.splitlines()[-1])
    lines = ["| roles of DMD2 | predicted MiB | measured MiB | measured / predicted |", "|---|---|---|---|"]
    for name, row in found.items():
        predicted, measured = row["predicted"], row["measured"]
        lines.append(f"| {name} | {predicted / MIB:.0f} | {measured / MIB:.0f} | {measured / predicted:.2f} |")
    text = "\n".join(lines)
    if a.markdown is not None:
        a.markdown.write_text(text + "\n")
    share = found["LoRA on a shared base"]["measured"] / found["full copies"]["measured"]
    print(f"{text}\n\n{found['full copies']['parameters']:,} parameters; LoRA needs {share:.2f} of the copies' peak")
    return 0 if share < 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
