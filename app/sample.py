"""`fewstep sample`: a picture from a student or a teacher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.app.clips import save_mp4
from fewstep.distill import picture
from fewstep.distill.captions import read_captions
from fewstep.distill.evaluation import Sampler, Teacher, revisions, student_folder, student_sampler
from fewstep.distill.sources import valid
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, dtypes, family, load_student, parts, resolve, student_in
from fewstep.samplers.manifest import MANIFEST, read_manifest

STILL, ANIMATED = (".png", ".jpg", ".jpeg"), (".mp4", ".webp", ".gif")


def sampler_of(
    source: str,
    steps: int,
    guidance: float | None,
    scheduler: str | None,
    timesteps: list[int] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "fp32",
    eta: float | None = None,
    negative_prompt: str | None = None,
    **size: int | None,
) -> Sampler:
    """A student by its own plan, or a pipeline by a stock scheduler; revision and variant are the pipeline's or the base's.

    `size` is height, width, num_frames where they are not those of its training, or the pipeline's own.
    """
    revision = revisions([source], revision)[source]
    if student_folder(source) is None:
        for lora in parts(source)[1]:
            if (Path(lora.rpartition("*")[0] or lora) / MANIFEST).is_file():
                print(
                    f"note: {lora} is a student of fewstep: here its LoRA alone, without its plan; sample {lora}",
                    file=sys.stderr,
                )
        teacher = Teacher(source, revision, variant, negative_prompt or "", dtypes(dtype), **size)
        sampler = teacher.sampler(steps, guidance, scheduler, timesteps=timesteps, eta=eta)
        if negative_prompt and (sampler.guidance <= 1 or denoiser_of(teacher.pipeline).takes_guidance):
            raise UserError(
                "--negative-prompt: only guidance by a second call leads away from one, at a --guidance-scale above 1; leave it out"
            )
        return sampler
    own = (
        ("--scheduler", scheduler),
        ("--timesteps", timesteps),
        ("--eta", eta),
        ("--negative-prompt", negative_prompt),
    )
    for option, value in own:
        if value is not None:
            raise UserError(f"{option} {value}: {source} is a student, which samples by its own plan; leave it out")
    needs_base(source, revision, variant)
    student, manifest = load_student(source, variant=variant, revision=revision, **student_in(dtype))
    return student_sampler(student, manifest, source, steps, guidance, **size)


def needs_base(student: str, revision: str | None, variant: str | None) -> None:
    """UserError for files of a base where a student, a full one, needs none."""
    manifest = read_manifest(Path(resolve(student)))
    for option, value in (("--revision", revision), ("--variant", variant)):
        if value is not None and manifest.kind == "full":
            raise UserError(f"{option} {value}: {student} is a full student, which needs no base; leave it out")


def sample(
    source: str,
    prompts: list[str],
    file: str | None,
    steps: int,
    seed: int,
    n: int,
    out: Path,
    guidance: float | None,
    scheduler: str | None,
    timesteps: list[int] | None = None,
    batch_size: int = 16,
    **how: Any,
) -> int:
    """Write a picture: a row of n images for each prompt, image j from seed + j; of clips the frames of each.

    What `how` has is as `sampler_of` takes it.

    Returns:
        Number of images.
    """
    if (suffix := out.suffix.lower()) not in (*STILL, *ANIMATED):
        raise UserError(f"--out {out}: must end in .png or .jpg, of clips also in .mp4, .webp or .gif")
    prompts = prompts + (read_captions(file) if file else [])
    if not prompts:
        raise UserError("no prompt: say -p PROMPT, or --prompts FILE with one prompt a line")
    prompts = [valid(prompt, "prompt") for prompt in prompts]
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; name a file in it")
    sampler = sampler_of(source, steps, guidance, scheduler, timesteps, **how)
    clips = family(type(sampler.pipeline).__name__).clips
    if suffix == ".mp4" and not clips:
        raise UserError(f"--out {out}: {source} makes images; name a .png")
    every = [(p, seed + j) for p in prompts for j in range(n)]
    drawn = []
    for i in range(0, len(every), batch_size):
        batch = every[i : i + batch_size]
        drawn.append(sampler.images([p for p, _ in batch], [s for _, s in batch]))
    images = (torch.cat(drawn) * 255).round().to(torch.uint8)
    if suffix in ANIMATED and clips:
        save_clips(images, n, out, sampler.frames_per_second)
    else:
        picture.save(grid(images, n), out)
    return len(every)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, 3, H, W) in rows of `columns`; clips (N, F, 3, H, W) by their frames."""
    if images.ndim == 5:
        return picture.sheet(images)
    rows = images.view(-1, columns, *images.shape[1:])  # (rows, columns, 3, H, W)
    return picture.to_image(rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2))


def save_clips(clips: Tensor, columns: int, out: Path, frames_per_second: float) -> None:
    """Clips (N, F, 3, H, W) in rows of `columns` as one that plays."""
    first, *rest = frames = [grid(clips[:, f], columns) for f in range(clips.shape[1])]
    with picture.replaced(out) as new:
        if out.suffix.lower() == ".mp4":
            pixels = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])
            save_mp4(pixels, new, frames_per_second)
        else:
            first.save(new, save_all=True, append_images=rest, duration=round(1000 / frames_per_second), loop=0)
