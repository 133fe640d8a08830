"""Figures of a row from images that arrive in any parts, in any order and in any process.

`see` takes in a batch, `see_prompt` the images of one prompt, `+` what another process saw, and `figures` reads them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.distill.evaluation import Figures
from fewstep.distill.judges import Judges, refusals
from fewstep.distill.metric_names import FRECHET, MANIFOLD, MANIFOLDS, METRICS, OF_PROMPTS
from fewstep.metrics.features import Features, Kept
from fewstep.metrics.frechet import Gaussian, Running, frechet_figure, frechet_infinity
from fewstep.metrics.networks import cosine
from fewstep.metrics.pixels import image_psnr, mean_distance
from fewstep.metrics.scores import Scores, mean_error
from fewstep.metrics.video import OfLength
from fewstep.samplers.errors import UserError

GROUPS = 10
"""Parts of a row that the error of a Frechet distance comes from: it costs as many distances more."""

KID_SUBSET = 1000
"""Images in a subset of KID, as published; of smaller sets all. KID has no bias, so that the size moves only its error."""


@dataclass
class Seen:
    """What the figures need of the images seen so far. Picklable; adds. Rows and references are the same thing.

    Attributes:
        running: moments by feature space.
        kept: features by feature space.
        scores: single values by figure and number of the image or prompt.
        published: moments of a reference whose images are not here.
    """

    running: dict[str, Running] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)
    published: dict[str, Gaussian] = field(default_factory=dict)

    def gaussian(self, space: str) -> Gaussian:
        """Mean and covariance in a feature space."""
        return self.published[space] if space in self.published else self.running[space].moments()

    def __add__(self, other: Seen) -> Seen:
        return Seen(_both(self.running, other.running), _both(self.kept, other.kept), self.scores + other.scores)


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {k: a[k] + b[k] if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}


def see(
    seen: Seen,
    images: Tensor,
    keys: Sequence[int],
    names: Sequence[str],
    judges: Judges,
    prompts: Sequence[str] | None = None,
    target: Tensor | None = None,
) -> None:
    """Take in a batch.

    Args:
        seen: grows.
        images: (B, 3, H, W) uint8, or clips (B, F, 3, H, W).
        keys: their numbers in the row.
        names: of the figures.
        judges: the networks.
        prompts: of the images.
        target: the teacher's images of the same noise.

    Raises:
        UserError: images that a figure cannot judge.
    """
    found: dict[str, Tensor] = {}

    def features(space: str) -> Tensor:
        """Of each image once; of every frame of a clip."""
        if space not in found:
            found[space] = network(space)(images.flatten(0, 1) if space == "frames" else images)
        return found[space]

    def network(space: str) -> Features:
        return OfLength(judges.i3d, images.shape[1]) if space == "i3d" else judges.space(space)

    def numbers(space: str) -> Sequence[int]:
        """Frames of a clip are alike, so that the error of their distance leaves out clips: they have its number."""
        return [k for k in keys for _ in range(images.shape[1])] if space == "frames" else keys

    with refusals():
        for space in judges.frechet_spaces(names):
            name = network(space).name
            running = seen.running.setdefault(space, Running(name, GROUPS))
            if running.features != name:
                raise UserError(f"fvd compares clips of one length; got {running.features} and {name}")
            running.update(features(space), numbers(space))
        for space in judges.kept_spaces(names):
            kept = seen.kept.setdefault(space, Kept(judges.space(space).name))
            kept.update(features(space), numbers(space))
        for name, values in _values(images, features, names, judges, prompts, target).items():
            seen.scores.update(keys, **{name: values})


def _values(
    images: Tensor,
    features: Callable[[str], Tensor],
    names: Sequence[str],
    judges: Judges,
    prompts: Sequence[str] | None,
    target: Tensor | None,
) -> dict[str, Tensor]:
    """Figures that have a value for each image."""
    found: dict[str, Tensor] = {}
    if "aesthetic" in names:
        from fewstep.metrics.aesthetic import aesthetic

        found["aesthetic"] = aesthetic(features("clip"), judges.aesthetic)
    if prompts is not None:
        for name in set(names) & set(OF_PROMPTS):
            if name == "clip":
                found[name] = 100 * cosine(features("clip"), judges.clip.texts(prompts))
            else:
                found[name] = getattr(judges, name)(images, prompts)
    if set(names) & {"motion", "consistency", "flow_motion", "dynamic_degree"}:
        found |= _of_clips(images, names, judges)
    to_teacher = [n for n in names if n.endswith("_to_teacher")]
    if target is not None and to_teacher:
        if images.shape != target.shape:
            got, want = ("x".join(map(str, x.shape[1:])) for x in (images, target))
            raise UserError(f"metric {to_teacher[0]}: the teacher's images are {want}, these are {got}")
        if to_teacher == ["psnr_to_teacher"]:
            found["psnr_to_teacher"] = image_psnr(images, target)
        else:
            from fewstep.metrics.fidelity import fidelity

            lpips = judges.lpips if "lpips_to_teacher" in names else None
            near = judges.clip.similarity if "clip_to_teacher" in names else None
            values = fidelity(images, target, lpips, near)
            values["clip"] = values.pop("clip_similarity", torch.empty(0))
            found |= {n: values[n.removesuffix("_to_teacher")] for n in to_teacher}
    return found


def _of_clips(clips: Tensor, names: Sequence[str], judges: Judges) -> dict[str, Tensor]:
    from fewstep.metrics import video

    found: dict[str, Tensor] = {}
    if "motion" in names:
        found["motion"] = video.motion(clips)
    if "consistency" in names:
        found["consistency"] = video.consistency(video.frame_features(judges.clip, clips))
    if "flow_motion" in names:
        found["flow_motion"] = video.flow_motion(judges.raft, clips)
    if "dynamic_degree" in names:
        found["dynamic_degree"] = video.dynamic(judges.raft, clips, judges.weights.clip_fps)
    return found


VARIETY = {"pixel_distance", "diversity_lpips", "diversity_lpips_ratio"}
"""Figures of a prompt's images together, pixel by pixel."""


def see_prompt(seen: Seen, images: Tensor, key: int, names: Sequence[str], judges: Judges) -> None:
    """Take in all images of one prompt, number `key`, where there are two or more: their variety."""
    if len(images) < 2:
        return
    with refusals():
        if "pixel_distance" in names:
            value, error = mean_distance(images, [0] * len(images))
            seen.scores.update([key], pixel_distance=torch.tensor([value]).double())
            if error == error:  # where this is the only prompt
                seen.scores.update([key], **{ALONE: torch.tensor([error]).double()})
        if (VARIETY - {"pixel_distance"}) & set(names):
            from fewstep.metrics.diversity import mean_pairwise

            value = mean_pairwise(images, judges.lpips)
            seen.scores.update([key], diversity_lpips=torch.tensor([value]).double())


ALONE = "pixel_distance of one prompt: error"


def figures(
    names: Sequence[str],
    seen: Seen,
    judges: Judges,
    groups: Sequence[int] | None = None,
    reference: Seen | None = None,
    teacher: Seen | None = None,
) -> tuple[Figures, list[str]]:
    """Those of the figures that this row has, and what its reader should be told (too few images).

    Args:
        names: of `METRICS`; the embedded ones are left out.
        seen: all of the row.
        judges: the networks.
        groups: number of each image's prompt.
        reference: what Frechet and kernel distances and manifolds compare with.
        teacher: its many-step images, for ratios.
    """
    found: Figures = {}
    with warnings.catch_warnings(record=True) as said, refusals():
        warnings.simplefilter("always")
        for name in names:
            value = _figure(name, seen, judges, groups, reference, teacher)
            if value is not None:
                found[name] = value
        if reference is not None and any(METRICS[n].network == MANIFOLD for n in names):
            from fewstep.metrics.manifolds import manifolds

            space = judges.weights.manifold_space
            every = manifolds(seen.kept[space].tensor(), reference.kept[space].tensor())
            found |= {n: every[MANIFOLDS[n]] for n in names if n in MANIFOLDS}
            ours, theirs = (len(s.kept[space].tensor()) for s in (seen, reference))
            if ours != theirs:
                warnings.warn(
                    f"{', '.join(n for n in names if n in MANIFOLDS)}: {ours} images and a reference of {theirs}; "
                    "such figures depend on both numbers, so compare them only with those of the same two",
                    stacklevel=2,
                )
    return {n: found[n] for n in names if n in found}, list(dict.fromkeys(str(w.message) for w in said))


def _figure(
    name: str,
    seen: Seen,
    judges: Judges,
    groups: Sequence[int] | None,
    reference: Seen | None,
    teacher: Seen | None,
) -> tuple[float, float] | None:
    if name in FRECHET and reference is not None:
        distance = frechet_infinity if name.endswith("_infinity") else frechet_figure
        return distance(seen.running[FRECHET[name]], reference.gaussian(FRECHET[name]))
    if name == "kid" and reference is not None:
        from fewstep.metrics.mmd import kid

        x, y = seen.kept["inception"].tensor(), reference.kept["inception"].tensor()
        return kid(x, y, size=min(KID_SUBSET, len(x), len(y)))
    if name == "cmmd" and reference is not None:
        from fewstep.metrics.mmd import cmmd

        x, y = (F.normalize(k.kept["clip"].tensor(), dim=-1) for k in (seen, reference))
        return cmmd(x, y)
    if name == "is":
        from fewstep.metrics.inception import inception_score

        return inception_score(judges.inception.logits(seen.kept["inception"].tensor()))
    if name in ("vendi", "vendi_ratio", "diversity_lpips_ratio"):
        return _diversity(name, seen, groups, teacher)
    values = seen.scores.values.get(name)
    if not values:
        return None
    if name == "clip":
        from fewstep.metrics.clip import clip_score

        return clip_score(seen.scores.column("clip"), _prompts_of(seen, name, groups))
    value, error = mean_error(seen.scores.column(name), _prompts_of(seen, name, groups))
    if name == "pixel_distance" and len(values) == 1 and seen.scores.values.get(ALONE):
        error = seen.scores.column(ALONE).item()
    return value, error


def _prompts_of(seen: Seen, name: str, groups: Sequence[int] | None) -> Sequence[int] | None:
    """The prompt of each value of a figure of single images; None of one that has a value for each prompt."""
    return None if groups is None or name in VARIETY else [groups[k] for k in seen.scores.keys(name)]


def _diversity(name: str, seen: Seen, groups: Sequence[int] | None, teacher: Seen | None) -> tuple[float, float] | None:
    from fewstep.metrics.diversity import by_prompt, ratio, vendi

    if groups is None or (name.endswith("_ratio") and teacher is None):
        return None
    both = [seen] if teacher is None or not name.endswith("_ratio") else [seen, teacher]
    if name.startswith("vendi"):
        columns = [by_prompt(s.kept["clip"].tensor(), groups, vendi)[1] for s in both]
    else:
        columns = [s.scores.column("diversity_lpips") for s in both]
    return ratio(columns[0], columns[1]) if len(columns) == 2 else mean_error(columns[0])
