"""Train the embedded autoencoder: `python -m fewstep.distill.teachers.autoencoder PACKAGE OUT [ITERATIONS]`.

A tiny `AutoencoderKL` (64x64 images, 16x16 latents of 4 channels) on every Noto drawing over any colour, half of the
time on the shipped drawings and colours. PACKAGE as in `drawings.py`. Writes OUT/vae; starts again from OUT/state.pt
if it was interrupted.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewstep.distill.checkpoint import replaced
from fewstep.distill.teachers.drawings import noto
from fewstep.metrics.emoji.drawings import COLORS, NAMES, compose, compositions, jittered, place, render

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH, RATE, WARM_UP, DECAY = 32, 2e-3, 200, 0.998


def batch(drawings: list, rng: random.Random) -> Tensor:
    """(BATCH, 3, 64, 64) in -1..1: half shipped compositions, half any drawing on any colour, farther off centre."""
    images = [render(jittered(rng.randrange(len(NAMES)), rng.randrange(len(COLORS)), rng)) for _ in range(BATCH // 2)]
    for _ in range(BATCH // 2):
        color = tuple(rng.randrange(256) for _ in range(3))
        dx, dy = rng.randint(-5, 5), rng.randint(-5, 5)
        images.append(compose(color, *place(rng.choice(drawings), rng.randrange(40, 54)), dx, dy))
    return to_tensor(images)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Pictures (64, 64, 3) uint8 to (N, 3, 64, 64) in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss(x: Tensor, y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """L1 + L1 of image gradients + squared error + a little KL, so that latents stay near unit scale."""
    e = y - x
    edges = e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return e.abs().mean() + edges + e.square().mean() + 1e-3 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """Mean PSNR of a round trip in decibels, and the standard deviation of the latents."""
    z = vae.encode(images).latent_dist.mode()
    mse = ((vae.decode(z).sample.clamp(-1, 1) - images).square().mean((1, 2, 3))) / 4
    return (-10 * mse.log10()).mean().item(), z.std().item()


def main(package: str, out: str, iterations: int = 6000) -> None:
    """Train, report every 200 iterations, write OUT/vae."""
    from diffusers import AutoencoderKL

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = list(noto(Path(package)).values())
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    ).to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY), use_buffers=True
    )
    optimizer = torch.optim.AdamW(vae.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    start, state = 0, folder / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start = saved["iteration"]
        for name, holder in (("vae", vae), ("average", average), ("optimizer", optimizer)):
            holder.load_state_dict(saved[name])
    unseen = to_tensor([render(c) for c in compositions(256, seed=99)])
    for i in range(start, iterations):
        rate = RATE * min(1, (i + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / iterations)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(i)
        x = batch(drawings, random.Random(i)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        value = loss(x, y.float(), posterior.mean.float(), posterior.logvar.float())
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        if (i + 1) % 200 == 0 or i + 1 == iterations:
            decibels, spread = psnr(average.module, unseen)
            print(f"{i + 1} loss {value.item():.4f} psnr {decibels:.2f} latent std {spread:.3f}", flush=True)
            saved = {"vae": vae, "average": average, "optimizer": optimizer}
            with replaced(state) as new:
                torch.save({"iteration": i + 1, **{k: v.state_dict() for k, v in saved.items()}}, new)
    vae = average.module.to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=round(1 / psnr(vae, unseen)[1], 4))
    vae.save_pretrained(folder / "vae")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
