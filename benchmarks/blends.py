"""How far pictures of the embedded teacher lie from the nearest drawing, beside real ones that went through its autoencoder.

    python benchmarks/blends.py [--num 512] [--steps 50] [--guidance 2]

No real picture is a blend by `NEAR`, so that no ratio to them can be taken there: for distances that a share of the real
ones exceeds, prints which share of the teacher's does.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from fewstep.distill.console import answer, quiet
from fewstep.distill.evaluation import Teacher, device, draw
from fewstep.distill.prompt_sets import prompt_set
from fewstep.metrics.emoji.drawings import color_of
from fewstep.metrics.emoji.metrics import renderings
from fewstep.metrics.emoji.nearest import NEAR, nearest
from fewstep.samplers.load import denoiser_of

SHARES = (0.1, 0.05, 0.02, 0.01)
SEED = 50_000
"""Of the real pictures."""


def compressed(teacher: Teacher, images: Tensor) -> Tensor:
    """Images (N, 3, 64, 64) uint8 after the teacher's autoencoder, uint8."""
    denoiser, parts = denoiser_of(teacher.pipeline), []
    with torch.no_grad():
        for part in images.split(32):
            parts.append(denoiser.decode(denoiser.to_latents(part.to(device()).float() / 255)))
    return (torch.cat(parts) * 255).round().to(torch.uint8)


def benchmark(options: argparse.Namespace) -> None:
    """Draw, measure, print."""
    quiet()
    prompts = prompt_set(options.prompts, options.num, options.seed)
    colors = [color_of(prompt) for prompt in prompts.prompts]
    teacher = Teacher("embedded:emoji")
    sampler = teacher.sampler(options.steps, options.guidance, "ddim", options.spacing)
    real = nearest(compressed(teacher, renderings(prompts.prompts, SEED)), colors).distance
    drawn = nearest(draw(sampler, prompts, 50).images, colors).distance
    print("| rms distance, 0..255 | real pictures beyond | teacher's beyond | ratio |\n| --- | --- | --- | --- |")
    for bound in [*real.quantile(1 - torch.tensor(SHARES)).tolist(), NEAR]:
        of_real, of_drawn = ((d > bound).float().mean().item() for d in (real, drawn))
        ratio = f"{of_drawn / of_real:.2f}" if of_real else "-"
        print(f"| {bound:.1f} | {of_real:.3f} | {of_drawn:.3f} | {ratio} |")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--spacing", default="linspace")
    parser.add_argument("--prompts", default="embedded:emoji")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(answer(lambda: benchmark(options)))


if __name__ == "__main__":
    main()
