"""Several students, each distilled on a part of the prompts (multi-student distillation, arXiv:2410.23274).

Parts are clusters of the prompts' embeddings, balanced to equal shares, or runs of classes; an image goes with its caption.
Every part is an ordinary run of the config's own method, on its own samples alone, one after the other; then they are put
together with the router.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from fewstep.distill import cache, checkpoint, report, run
from fewstep.distill import data as data_sets
from fewstep.distill.config import ConfigError, TrainConfig
from fewstep.distill.data import DataSet
from fewstep.distill.files import source
from fewstep.distill.random import generator
from fewstep.distill.record import refuse_changes, refuse_foreign
from fewstep.distill.student_start import starts_of
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import load
from fewstep.samplers.router import ROUTER, Router, directions, key_of
from fewstep.samplers.several import save_several

ITERATIONS, RESTARTS = 50, 10
BALANCE_STEPS, CLOSE, LIMIT = 3000, 0.02, 0.2
"""Balancing ends where every share is within CLOSE of 1/P, relatively; one further off than LIMIT at the end is refused."""


class Part:
    """Some samples of a data set, each with the caption that was drawn for it, images along with it where there are some.

    Args:
        data: the whole.
        samples: numbers of those that are in this part.
        drawn: the caption of each of these, by its index in the data's.
    """

    def __init__(self, data: DataSet, samples: Sequence[int], drawn: Sequence[int]):
        kept = sorted(set(drawn))
        index = {k: i for i, k in enumerate(kept)}
        self.data, self.samples, self.drawn = data, list(samples), [index[k] for k in drawn]
        self.captions = [data.captions[k] for k in kept]
        self.has_images, self.buckets = data.has_images, data.buckets
        self.bucket_of = [data.bucket_of[i] for i in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def caption(self, i: int, u: float) -> int:
        return self.drawn[i]

    def image(self, i: int) -> Tensor:
        return self.data.image(self.samples[i])

    def sizes(self, i: int) -> list[int]:
        return self.data.sizes(self.samples[i])

    def content(self, i: int) -> str:
        return self.data.content(self.samples[i])


def clusters(rows: Tensor, weights: Tensor, parts: int, seed: int) -> Tensor:
    """Centroids (P, d) of spherical k-means: the best of several starts by k-means++.

    Args:
        rows: (n, d), of length 1.
        weights: (n,), shares of the rows.
        parts: P.
        seed: of the starts.
    """
    best, found = -float("inf"), rows[:parts]
    for restart in range(RESTARTS):
        source = generator(seed, "clusters", restart)
        centroids = rows[torch.multinomial(weights, 1, generator=source)]
        for _ in range(parts - 1):
            away = (1 - rows @ centroids.T).amin(1).clamp(min=0) * weights
            if not (away > 1e-6 * weights).any():
                raise UserError(f"parts {parts}: there are only {len(centroids)} different prompts to split")
            centroids = torch.cat([centroids, rows[torch.multinomial(away, 1, generator=source)]])
        for _ in range(ITERATIONS):
            own = (rows @ centroids.T).argmax(1)
            sums = torch.zeros_like(centroids).index_add_(0, own, rows * weights[:, None])
            moved = torch.nn.functional.normalize(sums, dim=1)
            centroids = torch.where((sums != 0).any(1, keepdim=True), moved, centroids)  # an empty one stays
        score = ((rows @ centroids.T).amax(1) * weights).sum().item()
        if score > best:
            best, found = score, centroids
    return found


def shares(part: Tensor, weights: Tensor, parts: int) -> Tensor:
    """Mass of each part, (P,)."""
    return torch.zeros(parts, dtype=weights.dtype).index_add_(0, part, weights)


def offsets(scores: Tensor, weights: Tensor) -> Tensor:
    """What to add to scores (n, P) so that parts weigh alike, (P,); such a power diagram reaches any masses."""
    parts = scores.shape[1]
    added, best, found = torch.zeros(parts, dtype=scores.dtype), float("inf"), torch.zeros(parts, dtype=scores.dtype)
    for k in range(BALANCE_STEPS):
        gap = shares((scores + added).argmax(1), weights, parts) - 1 / parts
        off = gap.abs().max().item() * parts
        if off < best:
            best, found = off, added
        if off < CLOSE:
            break
        added = added - 0.2 / (1 + k / 100) * gap
    if best > LIMIT:
        raise UserError(f"parts {parts}: the prompts fall into parts of unlike size, {best:.0%} off; take fewer parts")
    return found


def fit(embeddings: Tensor, weights: Tensor, parts: int, seed: int) -> Router:
    """The router of embeddings (n, d) with shares (n,) that sum to 1."""
    mean = (embeddings * weights[:, None]).sum(0)
    rows = directions(embeddings, mean)
    centroids = clusters(rows, weights, parts, seed)
    added = offsets(rows.double() @ centroids.double().T, weights.double())
    return Router({"centroids": centroids, "offsets": added.float(), "mean": mean})


def blocks(classes: Tensor, parts: int) -> Router:
    """Runs of consecutive classes with about as many prompts each; a class without prompts goes with the nearest.

    Args:
        classes: of the prompts, as often as they are drawn.
        parts: P.
    """
    there, counts = classes.unique(return_counts=True)
    if parts > len(there):
        raise UserError(f"parts {parts}: there are only {len(there)} classes")
    until, begins = counts.cumsum(0), [0]
    for i in range(1, parts):
        even = int((parts * until - i * len(classes)).abs().argmin()) + 1
        begins.append(min(max(even, begins[-1] + 1), len(there) - parts + i))  # a class at least for each
    run = torch.bucketize(torch.arange(len(there)), torch.tensor(begins), right=True) - 1
    nearest = (torch.arange(int(there[-1]) + 1)[:, None] - there).abs().argmin(1)
    return Router({"class_table": run[nearest]})


def drawn(data: DataSet, seed: int) -> list[int]:
    """A caption of each sample, by its index, as training draws them."""
    u = torch.rand(len(data), generator=generator(seed, "captions of parts")).tolist()
    return [data.caption(i, u[i]) for i in range(len(data))]


def train_parts(config: TrainConfig, parts: int, resume: bool = False, data: DataSet | None = None) -> Path:
    """Train a student for each part of the prompts and put them together; the run's folder.

    The router is fitted once, before any student, and kept in the folder; a resumed run goes on in the part where it was.

    Raises:
        ConfigError, UserError: what is wrong and what would be right, in one line each.
    """
    run.refuse(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "config: parts: students are trained one after the other by one process; launch without others"
        )
    folder = config.run_dir
    begun = (folder / ROUTER).is_file() and (
        folder / "config.yaml"
    ).is_file()  # the router alone: it ended between the two
    if begun and not resume:
        raise UserError(f"{folder}: holds a run already; --resume continues it, name=OTHER starts another")
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: holds a run of one student; name=OTHER starts another")
    if begun:
        refuse_changes(folder, config)
    else:
        refuse_foreign(folder)
        (folder / ROUTER).unlink(missing_ok=True)  # of other prompts, maybe
    starts = starts_of(config) if config.student_init is not None else []
    router, lists = _split(config, parts, data, starts)
    with checkpoint.writing(folder, "set output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        router.save(folder / ROUTER)
        checkpoint.write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    students = []
    for i, part in enumerate(lists):
        own = {"output_dir": str(folder / "parts"), "name": f"part_{i}", "parts": 1, "report_num": None}
        own |= {"student_init": starts[i]} if len(starts) == parts else {}
        students.append(run.train(config.model_copy(update=own), resume, data=part) / "student")
    total = sum(map(len, lists))
    save_several(folder / "student", students, router, [len(part) / total for part in lists])
    return folder


def _split(config: TrainConfig, parts: int, data: DataSet | None, starts: Sequence[str]) -> tuple[Router, list[Part]]:
    """The router, from the folder if one is there, or that of the students it starts with; the samples of each part."""
    teacher = load(config.teacher, config.revision, config.variant)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    if len(teacher.networks) > 1:
        raise ConfigError("config: parts: not for a teacher of two networks, which levels are split between")
    if config.report_num is not None:
        report.check(config, run.methods_distiller(config, run.networks_of(config, teacher)).step_counts, teacher)
    if data is None:
        pixels, frames = teacher.pixels(config.height, config.width), teacher.frames(config.num_frames)
        data = data_sets.data_set(config, pixels, frames, source(config, teacher.clips))
    law = torch.tensor(drawn(data, config.seed))
    stored = cache.conditions(config, teacher, data.captions)
    # of each prompt what it is split by, a chunk at a time: all embeddings would fill the memory
    chunks = (stored[range(i, min(i + cache.CHUNK, stored.size))] for i in range(0, stored.size, cache.CHUNK))
    keys = torch.cat([key_of(condition) for condition in chunks])
    path = config.run_dir / ROUTER
    given = Router.load(Path(starts[0]).parent / ROUTER) if len(starts) == parts else None
    router = Router.load(path) if path.is_file() else given or _fit(config, parts, keys, law)
    if given is not None and router.sha256 != given.sha256:
        raise UserError(f"{path}: not the router of {config.student_init}; start anew under another name=")
    if router.parts != parts:
        raise UserError(f"{path}: of {router.parts} parts, the config has {parts}; start anew under another name=")
    of = router.of_keys(keys)
    samples = [(of[law] == i).nonzero()[:, 0].tolist() for i in range(parts)]
    if not all(samples):
        raise UserError(f"parts {parts}: no prompt falls into part {[bool(own) for own in samples].index(False)}")
    return router, [Part(data, own, law[own].tolist()) for own in samples]


def _fit(config: TrainConfig, parts: int, keys: Tensor, law: Tensor) -> Router:
    if keys.ndim == 1:
        return blocks(keys[law], parts)
    weights = torch.bincount(law, minlength=len(keys)).float() / len(law)
    return fit(keys[weights > 0], weights[weights > 0], parts, config.seed)
