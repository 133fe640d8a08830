"""The figures that `fewstep evaluate` and the evaluation in a training know, and what each needs. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple, NoReturn


class Metric(NamedTuple):
    """One figure.

    Attributes:
        about: what it says, for people.
        network: that judges, as `Judges` names it; none: pixels alone.
        needs: of reference (`--reference`), teacher (its many-step image of the same noise), prompts, variants (images
            of one prompt, two or more), images (still ones), clips, embedded (prompts that are captions of the drawings).
        better: which way.
    """

    about: str
    network: str
    needs: frozenset[str]
    better: str


def _metric(about: str, network: str, needs: str, better: str = "lower") -> Metric:
    return Metric(about, network, frozenset(needs.split()), better)


EMOJI = (
    *("fd_emoji", "fd_emoji_corrected", "clip_emoji", "background_accuracy", "category_accuracy"),
    *("coverage", "blends", "diversity"),
)
"""Figures of pictures whose prompts are the embedded ones, those of a report."""

DRAWINGS = (*EMOJI, "fd_emoji_infinity")
"""All of these."""

BASIC = ("psnr_to_teacher", "pixel_distance")
"""Figures of any pictures: against the teacher's many-step picture of the same noise, and among those of one prompt."""

MANIFOLD = "manifold"
"""In place of a network: the feature space that `--manifold-space` names."""

METRICS: dict[str, Metric] = {
    "fid": _metric("Frechet distance to the reference, Inception features", "inception", "reference images"),
    "fid_infinity": _metric("fid extrapolated to infinitely many images", "inception", "reference images"),
    "kid": _metric("kernel distance to the reference, unbiased at any number", "inception", "reference images"),
    "is": _metric("Inception score", "inception", "images", "higher"),
    "fd_dino": _metric("Frechet distance, DINOv2 features", "dino", "reference images"),
    "fd_dino_infinity": _metric("the same, extrapolated", "dino", "reference images"),
    "fd_clip": _metric("Frechet distance, CLIP features", "clip", "reference images"),
    "fd_clip_infinity": _metric("the same, extrapolated", "clip", "reference images"),
    "cmmd": _metric("kernel distance, CLIP features", "clip", "reference images"),
    "precision": _metric("share of images that look like the reference", MANIFOLD, "reference images", "higher"),
    "recall": _metric("share of the reference that the images reach", MANIFOLD, "reference images", "higher"),
    "density": _metric("precision that outliers of the reference do not raise", MANIFOLD, "reference images", "higher"),
    "manifold_coverage": _metric("recall that outliers do not raise", MANIFOLD, "reference images", "higher"),
    "clip": _metric("CLIP score: does the image follow its prompt", "clip", "prompts images", "higher"),
    "aesthetic": _metric("LAION's aesthetic head, about 1 to 10", "aesthetic", "images", "higher"),
    "hps": _metric("human preference score (package hpsv2)", "hps", "prompts images", "higher"),
    "image_reward": _metric("ImageReward (package image-reward)", "image_reward", "prompts images", "higher"),
    "vendi": _metric("how many different images among those of a prompt", "clip", "variants images", "higher"),
    "vendi_ratio": _metric("the same over the teacher's", "clip", "variants teacher images", "higher"),
    "diversity_lpips": _metric("LPIPS between images of one prompt", "lpips", "variants images", "higher"),
    "diversity_lpips_ratio": _metric("the same over the teacher's", "lpips", "variants teacher images", "higher"),
    "pixel_distance": _metric("grey levels between images of one prompt", "", "variants", "higher"),
    "psnr_to_teacher": _metric("dB to the teacher's image of the same noise", "", "teacher", "higher"),
    "ssim_to_teacher": _metric("structural similarity to that image", "", "teacher", "higher"),
    "lpips_to_teacher": _metric("LPIPS to that image", "lpips", "teacher"),
    "clip_to_teacher": _metric("cosine of CLIP features to that image", "clip", "teacher", "higher"),
    "fvd": _metric("Frechet distance of clips, I3D features", "i3d", "reference clips"),
    "fvd_infinity": _metric("the same, extrapolated", "i3d", "reference clips"),
    "frame_fid": _metric("Frechet distance of all frames, Inception features", "inception", "reference clips"),
    "frame_fid_infinity": _metric("the same, extrapolated", "inception", "reference clips"),
    "consistency": _metric("cosine of CLIP features of consecutive frames", "clip", "clips", "higher"),
    "motion": _metric("grey levels between consecutive frames", "", "clips", "higher"),
    "flow_motion": _metric("pixels that things move from frame to frame, optical flow", "raft", "clips", "higher"),
    "dynamic_degree": _metric("share of clips that move, as VBench counts it", "raft", "clips", "higher"),
    **{
        name: _metric(about, "", "embedded images", better)
        for name, about, better in (
            ("fd_emoji", "Frechet distance in the embedded judge's features", "lower"),
            ("fd_emoji_infinity", "the same, extrapolated", "lower"),
            ("fd_emoji_corrected", "the same less that of real drawings", "lower"),
            ("clip_emoji", "does the drawing follow its caption", "higher"),
            ("background_accuracy", "share with the colour asked for", "higher"),
            ("category_accuracy", "share with a drawing that the caption allows", "higher"),
            ("coverage", "drawings of a caption that are found, over as many as real pictures show", "higher"),
            ("blends", "share near to no drawing", "lower"),
            ("diversity", "distance of the judge's features within a prompt", "higher"),
        )
    },
}

_SPACES = {"fid": "inception", "fd_dino": "dino", "fd_clip": "clip", "frame_fid": "frames", "fvd": "i3d"}
FRECHET = _SPACES | {f"{name}_infinity": space for name, space in _SPACES.items()}
"""Frechet figures and their spaces, which need moments of a feature space alone: a file of mu and sigma will do as reference."""

MANIFOLDS = {"precision": "precision", "recall": "recall", "density": "density", "manifold_coverage": "coverage"}
"""Names of `metrics.manifolds` by ours."""

KEPT = {"kid": "inception", "is": "inception", "cmmd": "clip", "vendi": "clip", "vendi_ratio": "clip"}
"""Figures that need every image's features, and the space."""

OF_PROMPTS = ("clip", "hps", "image_reward")
"""Means over images of how each follows its own prompt."""

GIVEN = {
    "reference": "a reference; say --reference FOLDER, stats.npz or teacher",
    "teacher": "a pipeline or a student among the sources; folders of images have no teacher",
    "prompts": "prompts; a folder of images has them in a NAME.txt beside each",
    "variants": "two or more images of a prompt; say --per-prompt 2 or more",
    "embedded": "the embedded prompts, e.g. embedded:emoji, and not {prompts}",
    "clips": "clips, and these are images",
    "images": "still images, and these are clips; of clips there are fvd, frame_fid, consistency, motion, flow_motion and "
    "dynamic_degree",
}
"""How what a figure needs is supplied."""


@dataclass(frozen=True)
class Weights:
    """Where the networks come from, spelt as the command line's options.

    Attributes:
        inception_weights: a file; None: the published one, from torch's cache or downloaded.
        clip_model: a name of open_clip, a folder, or hf-hub:ORG/NAME.
        clip_weights: a tag of open_clip or a file; a folder has its own.
        dino_model: hub id or folder.
        lpips_net: alex, vgg or squeeze.
        lpips_weights: a file of torchvision's weights of it; None: torchvision's cache, or downloaded.
        aesthetic_weights: a file of LAION's head for that CLIP.
        hps_weights: a file; None: the package's download.
        i3d_weights: the TorchScript file of FVD's network.
        raft_weights: a file of torchvision's RAFT, large or small; None: the large one of torchvision's cache, or
            downloaded.
        clip_fps: frames a second of the clips, for dynamic_degree.
        manifold_space: inception, clip or dino: where precision, recall, density and manifold_coverage are taken.
    """

    inception_weights: str | None = None
    clip_model: str = "ViT-L-14"
    clip_weights: str = "openai"
    dino_model: str = "facebook/dinov2-large"
    lpips_net: str = "alex"
    lpips_weights: str | None = None
    aesthetic_weights: str = "sac+logos+ava1-l14-linearMSE.pth"
    hps_weights: str | None = None
    i3d_weights: str = "i3d_torchscript.pt"
    raft_weights: str | None = None
    clip_fps: float = 16
    manifold_space: str = "inception"


SPACES = ("inception", "clip", "dino")
"""Feature spaces of still images."""
CLIP_SPACES = ("frames", "i3d")
"""Of clips: Inception of all frames, and I3D of whole clips."""


def _refuse(line: str) -> NoReturn:
    from fewstep.samplers.errors import UserError  # its package imports torch

    raise UserError(line)


def unknown(name: str) -> str:
    """The line for a name that is no figure's: the nearest and all known."""
    near = get_close_matches(name.lower(), METRICS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"metric {name}: unknown; {hint}known: {', '.join(METRICS)}"


def parse(text: str) -> list[str]:
    """Names with commas between them, each once. UserError for an unknown one, with the nearest and all known."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        _refuse("--metrics: no name; known: " + ", ".join(METRICS))
    for name in names:
        if name not in METRICS:
            _refuse(unknown(name))
    return names


def check(names: Sequence[str], given: Collection[str], prompts: str = "") -> None:
    """UserError for the first figure that needs what is not given, with what would supply it."""
    for name in names:
        for need in sorted(METRICS[name].needs - set(given)):
            _refuse(f"metric {name}: needs {GIVEN[need].format(prompts=prompts)}")


def usable(names: Sequence[str], given: Collection[str]) -> list[str]:
    """Those of the figures that what is given suffices for."""
    return [name for name in names if METRICS[name].needs <= set(given)]


def fewest(name: str) -> int:
    """Images that a figure needs of a row: more than five neighbours, ten splits, or ten groups of two to extrapolate."""
    if name.endswith("_infinity"):
        return 20
    return 10 if name == "is" else 6 if METRICS[name].network == MANIFOLD else 2


def table() -> list[list[str]]:
    """A row for each figure: name, what it says, the network that judges, what else it needs, which way is better."""
    rows = [["metric", "what it says", "network", "needs", "better"]]
    for name, m in METRICS.items():
        needs = ", ".join(sorted(m.needs - {"images"})) or "-"
        rows.append([name, m.about, m.network or "-", needs, m.better])
    return rows
