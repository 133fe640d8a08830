"""Rows of a report: who samples, the images with their cost, and the figures of the images."""

from __future__ import annotations

import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.distill.metric_names import BASIC, DRAWINGS, EMOJI
from fewstep.distill.prompt_sets import PromptSet
from fewstep.samplers import single_file
from fewstep.samplers.adapters import bare
from fewstep.samplers.baseline import (
    OF_STUDENTS,
    counted,
    default_scheduler,
    has_spacing,
    is_flow,
    refuse_unknown,
    scheduler_of,
    stock_images,
)
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import family, load_pipeline, parts, resolve
from fewstep.samplers.manifest import MANIFEST, Manifest, read_manifest
from fewstep.samplers.plan import sample

Figures = dict[str, tuple[float, float]]
"""(value, standard error) by name."""

REFERENCE_SEED, REAL_SEED = 20_000, 40_000
"""Seeds of the real renderings that rows are compared with, and of those that are a row themselves."""

Progress = Callable[[int], None]
"""Told how many images were drawn."""


@dataclass(frozen=True)
class Sampler:
    """A row before it is measured: `images(prompts, seeds)` are (B, 3, H, W) or (B, F, 3, H, W) in 0..1, on the CPU.

    Attributes:
        networks: whose calls are counted.
        pipeline: that holds what else images depend on, such as text encoders and autoencoder.
        solver: its scheduler.
    """

    source: str
    role: Literal["teacher", "student"]
    steps: int
    guidance: float
    scheduler: str
    networks: list[nn.Module]
    pipeline: Any
    solver: Any
    images: Callable[[Sequence[str], Sequence[int]], Tensor]

    @property
    def frames_per_second(self) -> float:
        """Of clips."""
        return family(type(self.pipeline).__name__).frames_per_second(self.pipeline)


@dataclass(frozen=True)
class Drawn:
    """Images of a row, uint8, (N, 3, H, W) or (N, F, 3, H, W), and their measured cost."""

    images: Tensor
    seconds_per_image: float
    nfe: float


def reference_seeds() -> dict[str, int]:
    """Seeds of the real renderings by their use: compared with, subtracted as the bias of so many images, a row themselves."""
    from fewstep.metrics.emoji.metrics import CORRECTION_SEED

    return {"reference": REFERENCE_SEED, "correction": CORRECTION_SEED, "real renderings": REAL_SEED}


def device() -> str:
    """Where a command samples."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Teacher:
    """A pipeline sampled by stock schedulers.

    Args:
        source: pipeline folder, embedded:NAME or hub id.
        revision: of a hub id.
        variant: of the weights' files.
        negative_prompt: of every image.
        loading: further arguments of `load_pipeline`, such as `dtypes("bf16")`.
        size: height, width, num_frames; None: the pipeline's own.
    """

    def __init__(
        self,
        source: str,
        revision: str | None = None,
        variant: str | None = None,
        negative_prompt: str = "",
        loading: Mapping[str, Any] | None = None,
        **size: int | None,
    ):
        self.source, self.negative_prompt, self.size = source, negative_prompt, size
        self.pipeline: Any = load_pipeline(source, revision, variant, **(loading or {})).to(device())
        self.own = self.pipeline.scheduler

    @property
    def guidance_scale(self) -> float | None:
        """The pipeline's own; None where it takes none."""
        usual = inspect.signature(self.pipeline.__call__).parameters.get("guidance_scale")
        return None if usual is None else float(usual.default)

    def sampler(
        self,
        steps: int,
        guidance: float | None = None,
        scheduler: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        **size: int | None,
    ) -> Sampler:
        """The teacher in `steps` steps; guidance defaults to the pipeline's, the rest to the best known for few steps.

        A pipeline that takes no guidance scale is sampled, and said to be, without. `size` is for once what it is at
        construction.
        """
        if steps < 1:
            raise UserError(f"steps {steps}: must be at least 1")
        if timesteps is not None and len(timesteps) != steps:
            raise UserError(f"timesteps {','.join(map(str, timesteps))}: {len(timesteps)} of them for {steps} steps")
        top = self.own.config.get("num_train_timesteps", 1000) - (not is_flow(self.own))
        if timesteps is not None and not all(a > b for a, b in pairwise((top + 1, *timesteps))):
            raise UserError(f"timesteps {','.join(map(str, timesteps))}: must fall, from at most {top}")
        if guidance is not None and not math.isfinite(guidance):
            raise UserError(f"guidance scale {guidance}: must be a number")
        if eta is not None and not 0 <= eta <= 1:
            raise UserError(f"eta {eta}: must be from 0 to 1")
        usual = self.guidance_scale
        scale = 1.0 if usual is None else usual if guidance is None else guidance
        name = scheduler or default_scheduler(self.own)
        if timesteps is None and spacing is None and has_spacing(self.own) and name not in OF_STUDENTS:
            spacing = "trailing"
        solver = scheduler_of(self.own, name, spacing)
        said = type(solver).__name__.removesuffix("Scheduler") if name == "own" else name
        if eta is not None and "eta" not in inspect.signature(solver.step).parameters:
            raise UserError(f"eta: {type(solver).__name__} has none; scheduler ddim or tcd does")
        how = [spacing] if timesteps is None else [",".join(map(str, timesteps))]
        how = ", ".join([*filter(None, how), *([] if eta is None else [f"eta {eta:g}"])])
        sides = self.size | {k: v for k, v in size.items() if v is not None}

        def images(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            self.pipeline.scheduler = solver
            return stock_images(
                self.pipeline, prompts, seeds, steps, scale, self.negative_prompt, timesteps, eta, **sides
            )

        names = family(type(self.pipeline).__name__).network_names
        networks = [m for n in names if (m := getattr(self.pipeline, n, None)) is not None]
        what = f"{said} ({how})" if how else said
        return Sampler(self.source, "teacher", steps, scale, what, networks, self.pipeline, solver, images)


def teacher_of(
    manifest: Manifest,
    negative_prompt: str = "",
    revision: str | None = None,
    variant: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> Teacher:
    """The teacher that a student was made from, for samples of the student's size; its files are the manifest's unless told."""
    size = {"height": manifest.height, "width": manifest.width, "num_frames": manifest.num_frames}
    files = (revision or manifest.revision, variant or manifest.variant)
    return Teacher(manifest.base, *files, negative_prompt, loading, **size)


def student_sampler(
    denoiser: Denoiser,
    manifest: Manifest,
    source: str,
    steps: int,
    guidance: float | None = None,
    **size: int | None,
) -> Sampler:
    """A student in `steps` steps by its own plan; `guidance` only where it is an input of the student.

    `size` is height, width, num_frames where they are not those of its training.

    Raises:
        UserError: a step count that it does not declare, a guidance scale that it does not take, or a size that its
            pipeline does not.
    """
    plan = manifest.plan(steps)
    if guidance is not None:
        if plan.embedded_guidance is None:
            raise UserError(f"{source}: the student takes no guidance scale; it was trained at a fixed one")
        plan = plan.model_copy(update={"embedded_guidance": guidance})
    denoiser.to(device())
    refuse_unknown(denoiser.pipeline, (k for k, v in size.items() if v is not None))
    sides = (size.get(k) or getattr(manifest, k) for k in ("height", "width", "num_frames"))
    shape = denoiser.latent_shape(*sides)
    scale = plan.embedded_guidance if plan.embedded_guidance is not None else plan.steps[0].guidance_scale

    def images(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        with torch.no_grad():
            condition = denoiser.encode(prompts)
        return denoiser.decode(sample(denoiser, condition, plan, seeds, shape))

    networks = list(dict.fromkeys(m for n in denoiser.networks.values() if isinstance(m := bare(n), nn.Module)))
    of = denoiser.pipeline
    return Sampler(source, "student", steps, scale, plan.rule, networks, of, of.scheduler, images)


def timed(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, float]:
    """Images of one batch, uint8, and the seconds from prompts to pixels."""
    began = time.perf_counter()
    images = sampler.images(prompts, seeds)
    return (images * 255).round().to(torch.uint8), time.perf_counter() - began


def draw(
    sampler: Sampler,
    prompts: PromptSet,
    batch_size: int = 16,
    progress: Progress | None = None,
    reference: Tensor | None = None,
) -> Drawn:
    """All images of a row, a batch at a time, timed from prompts to pixels: the median over the full batches.

    What `figures` could not compare with `reference` is refused after one image.
    """
    parts, seconds = [], []
    first = sampler.images(prompts.prompts[:1], prompts.seeds[:1])  # and the first call of a process is slow
    same_size(first, prompts, reference)
    with counted(sampler.networks) as rows:
        for i in range(0, len(prompts), batch_size):
            images, took = timed(sampler, prompts.prompts[i : i + batch_size], prompts.seeds[i : i + batch_size])
            if len(images) == batch_size or not parts:
                seconds.append(took / len(images))
            parts.append(images)
            if progress is not None:
                progress(len(images))
    return Drawn(torch.cat(parts), statistics.median(seconds), sum(rows) / len(prompts))


def default_metrics(prompts: PromptSet) -> tuple[str, ...]:
    """The figures of a row unless told."""
    return EMOJI if prompts.embedded else BASIC


def reference_pictures(prompts: PromptSet, names: Sequence[str]) -> Tensor | None:
    """Real renderings of the prompts, (N, 3, 64, 64) uint8; None where no figure asks for them."""
    if not any(name in DRAWINGS for name in names):
        return None
    from fewstep.metrics.emoji.metrics import renderings

    return renderings(prompts.prompts, REFERENCE_SEED)


def figures(
    images: Tensor,
    prompts: PromptSet,
    names: Sequence[str],
    reference: Tensor | None = None,
    many: Tensor | None = None,
) -> Figures:
    """Those of the named figures that a row has.

    Args:
        images: (N, 3, H, W) or (N, F, 3, H, W) uint8.
        prompts: of the row.
        names: of `DRAWINGS` and `BASIC`.
        reference: `reference_pictures(prompts, names)`.
        many: the teacher's many-step images of the same noise; None: no `psnr_to_teacher`.
    """
    from fewstep.metrics.pixels import mean_distance, psnr

    found: Figures = {}
    if reference is not None:
        from fewstep.metrics.emoji.metrics import emoji_metrics

        same_size(images, prompts, reference)
        found |= emoji_metrics(images, prompts.prompts, reference, prompts.groups)
    if many is not None and "psnr_to_teacher" in names:
        found["psnr_to_teacher"] = psnr(images, many, prompts.groups)
    if "pixel_distance" in names:
        found["pixel_distance"] = mean_distance(images, prompts.groups)
    return {name: found[name] for name in names if name in found}


def same_size(images: Tensor, prompts: PromptSet, reference: Tensor | None) -> None:
    """UserError for images that the embedded judge, who knows those of `reference`, cannot see."""
    if reference is not None and images.shape[1:] != reference.shape[1:]:
        got, want = ("x".join(map(str, s.shape[-2:])) for s in (images, reference))
        what = "clips" if images.ndim == 5 else "images"
        raise UserError(f"prompts {prompts.name}: judged by images of {want} pixels; these are {what} of {got}")


@contextmanager
def bar(total: int, description: str) -> Iterator[Progress | None]:
    """A progress bar over images on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(description, total=total)
        yield lambda n: shown.advance(task, n)


def revisions(sources: Sequence[str], revision: str | None) -> dict[str, str | None]:
    """The revision of the repository that each source, or a student's base, comes from; None for those of folders.

    Raises:
        UserError: a revision where all are folders, which have none.
    """
    found = {source: None if _on_disk(source) else revision for source in sources}
    if revision is not None and found and not any(found.values()):
        raise UserError(
            f"--revision {revision}: of a repository of the hub; {', '.join(sources)}: on this disk, without any"
        )
    return found


def _on_disk(source: str) -> bool:
    folder = student_folder(source)
    place, _ = parts(source if folder is None else read_manifest(folder).base)
    file = single_file.split(place)
    if file is not None:  # whose config may come from a repository
        place = file[1] or ""
    return bool(place) and Path(resolve(place)).exists()


def student_folder(source: str | Path) -> Path | None:
    """The student's folder of a run, or a student's folder itself; None for a pipeline."""
    folder = Path(resolve(source))
    return folder if (folder / MANIFEST).is_file() else None
