"""Published backbones at their own size, random weights, on a GPU: bytes that the planner predicts, bytes and seconds measured.

    python benchmarks/real_size.py [--rows sd15,sdxl] [--iterations 6] [--markdown FILE] [--json FILE]

Each row is a process of its own: a shipped config with the settings that the row names, trained some iterations on random
embeddings of the text encoders' shapes (neither they nor the autoencoder are in memory, as with `offload_encoders`).
Measured are the peak of the caching allocator from before the networks are built, and the median seconds of iterations in
which the fake score alone steps and of those in which the student does too.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

GIB = 2**30
SDXL = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0; the others are the defaults of their classes
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sd15(make: Callable[..., Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Stable Diffusion 1.5 without encoders, and the shapes of its embeddings."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = make(UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
    parts: tuple[Any, ...] = (None, None, None, unet, DDIMScheduler(), None, None)
    pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    return pipeline, {"encoder_hidden_states": (77, 768)}


def sdxl(make: Callable[..., Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """SDXL base, as `sd15`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    unet = make(UNet2DConditionModel, **SDXL)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = StableDiffusionXLPipeline(**none, unet=unet, scheduler=scheduler, add_watermarker=False)
    return pipeline, {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)}


def flux(make: Callable[..., Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """FLUX.1 dev, as `sd15`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    transformer = make(FluxTransformer2DModel, guidance_embeds=True)
    pipeline = FluxPipeline(**none, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipeline, {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}


def sana(make: Callable[..., Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Sana 1.6B, as `sd15`."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipeline = SanaPipeline(**none, transformer=make(SanaTransformer2DModel), scheduler=scheduler)
    return pipeline, {"encoder_hidden_states": (300, 2304), "encoder_attention_mask": (300,)}


def wan(make: Callable[..., Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Wan 2.1 1.3B, as `sd15`."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = make(WanTransformer3DModel, num_attention_heads=12, num_layers=30, ffn_dim=8960)
    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    none: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    return WanPipeline(**none, scheduler=scheduler, transformer=transformer), {"encoder_hidden_states": (512, 4096)}


ROWS: dict[str, tuple[Callable[[Any], Any], str, list[str]]] = {
    "sd15": (sd15, "dmd2/sd15-lora", []),
    "sd15-xformers": (sd15, "dmd2/sd15-lora", ["attention=xformers"]),
    "sd15-bf16": (sd15, "dmd2/sd15-lora", ["base_dtype=bf16"]),
    "sd15-channels-last": (sd15, "dmd2/sd15-lora", ["base_dtype=bf16", "channels_last=true"]),
    "sd15-compile": (sd15, "dmd2/sd15-lora", ["base_dtype=bf16", "compile=true"]),
    "sd15-checkpointing": (sd15, "dmd2/sd15-lora", ["gradient_checkpointing=true"]),
    "sd15-full": (sd15, "dmd2/sd15", []),
    "sd15-full-8bit": (sd15, "dmd2/sd15", ["use_8bit_adam=true"]),
    "sdxl": (sdxl, "dmd2/sdxl-lora", ["gradient_checkpointing=false"]),
    "sdxl-xformers": (sdxl, "dmd2/sdxl-lora", ["gradient_checkpointing=false", "attention=xformers"]),
    "sdxl-checkpointing": (sdxl, "dmd2/sdxl-lora", []),
    "sdxl-full-beside": (sdxl, "dmd2/sdxl", ["train_batch_size=1", "fake_score=lora"]),
    "sdxl-full": (sdxl, "dmd2/sdxl", ["train_batch_size=1"]),
    "sana": (sana, "dmd2/sana-1.6b-lora", ["gradient_checkpointing=false"]),
    "flux": (flux, "dmd2/flux-dev-lora", []),
    "wan": (wan, "dmd2/wan21-1.3b-lora", []),
}
"""Backbone, shipped config, settings; every one at one micro-batch an iteration and `fake_score_updates=2`."""
COMMON = ["gradient_accumulation_steps=1", "fake_score_updates=2", "teacher=random", "prompts=random"]


def denoiser(build: Callable[[Any], Any], device: str, dtype: torch.dtype) -> Any:
    """A backbone on a device, whose embeddings are random."""
    from fewstep.samplers.load import denoiser_of

    def make(network: Callable[..., Any], **options: Any) -> Any:
        was = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return network(**options)
        finally:
            torch.set_default_dtype(was)

    pipeline, shapes = build(make)
    made = denoiser_of(pipeline)

    class Random(type(made)):  # type: ignore[misc]
        """Of the same family, without text encoders."""

        def embed(self, prompts: list[str]) -> dict[str, torch.Tensor]:
            n = len(prompts)
            return {k: (torch.ones if "mask" in k else torch.randn)(n, *s, device=device) for k, s in shapes.items()}

        embed_negative = embed

    made.__class__ = Random
    return made


held: list[IO[str]] = []


def hold(file: Path | None) -> None:
    """Wait for the GPU: imports and the plan of one row may run beside another's measurement."""
    if file is not None:
        held.append(file.open("w"))  # the lock goes with the process
        fcntl.flock(held[0], fcntl.LOCK_EX)


def one(name: str, iterations: int, turn: Path | None = None, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Train some iterations; parameters, predicted and measured bytes, seconds."""
    from accelerate import Accelerator

    from fewstep.distill import efficiency
    from fewstep.distill.batches import Batches
    from fewstep.distill.config import load_config
    from fewstep.distill.console import quiet
    from fewstep.distill.data import Prompts
    from fewstep.distill.memory import need
    from fewstep.distill.record import Record
    from fewstep.distill.run import methods_distiller, networks_of
    from fewstep.distill.trainer import Trainer

    quiet()
    build, path, settings = ROWS[name]
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(path, [*COMMON, f"output_dir={folder}", *settings, *extra])
        efficiency.refuse(config)
        shapeless = denoiser(build, "meta", torch.float32)
        shape = shapeless.latent_shape(config.height, config.width, config.num_frames)
        shapeless = shapeless.at(shape)
        planned = methods_distiller(config, networks_of(config, shapeless))
        predicted = need(config, planned, shapeless, config.gradient_checkpointing, fused=gpu)
        hold(turn)  # to the end of this process
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
        torch.manual_seed(0)
        dtype = torch.float32 if config.student == "full" else efficiency.DTYPES[config.base_dtype]
        teacher = denoiser(build, str(accelerator.device), dtype).at(shape)
        record = Record(config, accelerator)
        record.open(False)
        condition = teacher.encode(["a"]).to("cpu")
        method = methods_distiller(config, networks_of(config, teacher))
        said = efficiency.apply(config, method.roles(), accelerator.device)
        batches = Batches(
            Prompts(["a"]), shape, condition, None, 0, config.train_batch_size, 1, 0, 1, accelerator.device
        )
        trainer = Trainer(config, accelerator, method, batches, record)
        seconds: dict[str, list[float]] = {}
        with trainer.attention():
            for i in range(iterations + 2):  # the first of each kind warms up
                if gpu:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                trainer.step(i)
                if gpu:
                    torch.cuda.synchronize()
                seconds.setdefault(" and ".join(method.updates(i)), []).append(time.perf_counter() - began)
    count = sum(p.numel() for n in shapeless.networks.values() for k, p in n.named_parameters() if ".lora_" not in k)
    return {
        "config": path,
        "settings": settings,
        "batch": config.train_batch_size,
        "latents": shape,
        "parameters": count,
        "predicted": predicted.total,
        "measured": torch.cuda.max_memory_allocated() if gpu else 0,
        "seconds": {k: statistics.median(v[1:] or v) for k, v in seconds.items()},
        "said": said,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }


def table(found: dict[str, Any]) -> str:
    """Rows as markdown, and why one is missing."""
    lines = [
        "| config | settings | batch | predicted GiB | measured GiB | measured / predicted | s, fake score | s, both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name}: {row} |" + " |" * 7)
            continue
        times = [f"{row['seconds'].get(k, float('nan')):.2f}" for k in ("fake_score", "student and fake_score")]
        share = row["measured"] / row["predicted"]
        cells = [f"{row['predicted'] / GIB:.1f}", f"{row['measured'] / GIB:.1f}", f"{share:.2f}", *times]
        lines.append(f"| {row['config']} | {', '.join(row['settings'])} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure the rows, print the table."""
    parser = argparse.ArgumentParser(description="Memory and time of published backbones with random weights.")
    parser.add_argument("--rows", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--one", choices=ROWS, help="measure this row alone, in this process; print JSON")
    parser.add_argument("--turn", type=Path, help="of --one: a file to lock while measuring")
    parser.add_argument("--jobs", type=int, default=3, help="processes that get ready while one measures")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("settings", nargs="*", help="key=value for every row")
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(one(a.one, a.iterations, a.turn, a.settings)))
        return 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(a.jobs) as pool:

        def run(name: str) -> Any:
            options = ["--one", name, "--iterations", str(a.iterations), "--turn", f"{folder}/turn", *a.settings]
            done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
            lines = [line for line in done.stderr.splitlines() if "Error: " in line]  # CUDA's go on with advice
            failed = (lines or [f"exit code {done.returncode}"])[-1]
            found = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
            print(name, found, flush=True)
            return found

        names = a.rows.split(",")
        found = dict(zip(names, pool.map(run, names), strict=True))
    if a.json is not None:
        a.json.write_text(json.dumps(found, indent=1))
    print(text := table(found))
    if a.markdown is not None:
        a.markdown.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
