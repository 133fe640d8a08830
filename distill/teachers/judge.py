"""Train the embedded judge: `python -m fewstep.distill.teachers.judge OUT [ITERATIONS]`.

Renderings of every pair that is not held out, roughened so that the judge can be trusted beyond clean renderings,
against captions of every level of detail. Writes OUT/judge.safetensors, which ships as an asset of
`fewstep.metrics.emoji`; starts again from OUT/state.pt if it was interrupted.
"""

from __future__ import annotations

import io
import math
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.distill.checkpoint import replaced
from fewstep.metrics.emoji.drawings import (
    COLORS,
    HELD_OUT,
    NAMES,
    background_caption,
    captions,
    compose,
    compositions,
    full_caption,
    place,
    render,
    tiles,
)
from fewstep.metrics.emoji.judge import Judge, save

BATCH, RATE, WARM_UP, REPORT = 128, 2e-3, 100, 100
SEED = 10_000
"""Teachers train on `compositions` of small seeds; the judge's are larger."""
LEVELS = {"full": 0.5, "category": 0.25, "any color": 0.1, "background": 0.1, "empty": 0.05}


def caption_of(drawing: int, color: int, level: str) -> str:
    """The caption of a picture at a level of detail."""
    full, category, any_color = captions(drawing, color)
    background = background_caption(color)
    return {"full": full, "category": category, "any color": any_color, "background": background, "empty": ""}[level]


@cache
def true_captions(drawing: int, color: int) -> frozenset[str]:
    """Every caption that is true of a picture."""
    return frozenset(caption_of(drawing, color, level) for level in LEVELS)


@cache
def _placed(drawing: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    return place(Image.fromarray(tiles()[drawing], "RGBA"), size)


def rough(drawing: int, color: int, rng: random.Random) -> np.ndarray:
    """A rendering in more sizes and places, over a colour near the named one, half of the time through JPEG."""
    named = list(COLORS.values())[color]
    r, g, b = (min(255, max(0, c + rng.randint(-14, 14))) for c in named)
    placed = _placed(drawing, 2 * rng.randint(22, 27))
    image = compose((r, g, b), *placed, rng.randint(-5, 5), rng.randint(-5, 5))
    if rng.random() < 0.5:
        return image
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=rng.randint(30, 95))
    return np.asarray(Image.open(file))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast, brightness, blur and noise, half of the pictures spared each; (B, 3, 64, 64) in 0..1."""

    def strength(low: float, high: float) -> Tensor:
        drawn = torch.rand(2, len(x), 1, 1, 1, generator=generator)
        return (low + (high - low) * drawn[0]) * (drawn[1] < 0.5)

    x = (x - 0.5) * (1 + strength(-0.15, 0.1)) + 0.5 + strength(-0.04, 0.04)
    sigma = strength(0.3, 1.5).clamp(min=1e-3).view(-1, 1)
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma).square())
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)
    for shape, padding in (((7, 1), (0, 0, 3, 3)), ((1, 7), (3, 3, 0, 0))):
        padded = torch.nn.functional.pad(x, padding, "replicate").flatten(0, 1)[None]
        x = torch.nn.functional.conv2d(padded, taps.view(-1, 1, *shape), groups=padded.shape[1]).view(-1, *x.shape[1:])
    return (x + strength(0, 0.06) * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def batch(iteration: int) -> tuple[Tensor, list[str], Tensor]:
    """Pictures (B, 3, 64, 64) in 0..1, M distinct captions, and which are true of which, (B, M) bool."""
    rng = random.Random(SEED + iteration)
    chosen = compositions(BATCH, SEED + iteration)
    images = to_tensor([rough(c.drawing, c.color, rng) for c in chosen])
    levels = rng.choices(list(LEVELS), list(LEVELS.values()), k=BATCH)
    texts = list(dict.fromkeys(caption_of(c.drawing, c.color, level) for c, level in zip(chosen, levels, strict=True)))
    true = torch.tensor([[text in true_captions(c.drawing, c.color) for text in texts] for c in chosen])
    return augment(images, torch.Generator().manual_seed(SEED + iteration)), texts, true


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Pictures (64, 64, 3) uint8 to (N, 3, 64, 64) in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def contrastive(logits: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss (arXiv:2103.00020) where several captions are true of a picture and a caption of several pictures.

    The target of a row, and of a column, is uniform over what is true (as SupCon, arXiv:2004.11362, eq. 2), so a
    fruit is never pushed away from `a fruit`. Logits and truth: (B, M), at least one true in each row and column.
    """
    by_image = (logits.log_softmax(1) * true).sum(1) / true.sum(1)
    by_caption = (logits.log_softmax(0) * true).sum(0) / true.sum(0)
    return -(by_image.mean() + by_caption.mean()) / 2


@torch.no_grad()
def retrieval(judge: Judge, images: Tensor, pairs: list[tuple[int, int]]) -> float:
    """Share of pictures whose nearest full caption, among those of every drawing on every colour, is their own."""
    every = [full_caption(d, c) for d in range(len(NAMES)) for c in range(len(COLORS))]
    training = judge.training
    judge.eval()
    nearest = (judge.embed_features(judge.image(images)) @ judge.embed_captions(every).T).argmax(1)
    judge.train(training)
    found = [every[i] in true_captions(d, c) for i, (d, c) in zip(nearest.tolist(), pairs, strict=True)]
    return sum(found) / len(found)


def main(out: str, iterations: int = 1500) -> None:
    """Train, report and save every REPORT iterations, write OUT/judge.safetensors."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    start, state = 0, folder / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start = saved["iteration"]
        judge.load_state_dict(saved["judge"])
        optimizer.load_state_dict(saved["optimizer"])
    unseen = compositions(8 * len(HELD_OUT), 2 * SEED, sorted(HELD_OUT))
    pairs = [(c.drawing, c.color) for c in unseen]
    clean = to_tensor([render(c) for c in unseen])
    roughened = augment(clean, torch.Generator().manual_seed(2 * SEED))
    judge.train()
    for i in range(start, iterations):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (i + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * i / iterations))
        images, texts, true = batch(i)
        logits = judge.embed_features(judge.image(images)) @ judge.embed_captions(texts).T * judge.log_scale.exp()
        value = contrastive(logits, true)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            judge.log_scale.clamp_(max=math.log(50))
        if (i + 1) % REPORT == 0 or i + 1 == iterations:
            found, rough_found = retrieval(judge, clean, pairs), retrieval(judge, roughened, pairs)
            scale = judge.log_scale.exp().item()
            print(
                f"{i + 1} loss {value.item():.3f} scale {scale:.1f} "
                f"held-out retrieval {found:.4f}, roughened {rough_found:.4f}",
                flush=True,
            )
            holders = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict()}
            with replaced(state) as new:
                torch.save({"iteration": i + 1, **holders}, new)
    save(judge, folder / "judge.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
