"""Options that several commands share. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer

SOURCE = (
    "A run (runs/NAME), a student's folder, a pipeline folder, a hub id (ORG/NAME), embedded:emoji, or a checkpoint in one "
    "file, FILE.safetensors@CONFIG; PIPELINE+LORA adds a LoRA of any origin, a file or a hub id, PIPELINE+LORA*0.125 a part of it; PIPELINE+FILE.safetensors also takes a network alone."
)
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance of a teacher, 1 = none. Default: the pipeline's own.", min=0),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Of a pipeline: own, ddim, dpmsolver++, euler, unipc, or of one that was distilled elsewhere lcm or tcd. "
        "Default: the best known of a teacher for few steps."
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(help="Of a pipeline, instead of the scheduler's choice, e.g. 999,749,499,249 of DMD2's LoRA."),
]
Eta = Annotated[
    float | None,
    typer.Option(
        help="Fresh noise in each step of the schedulers ddim and tcd, e.g. 0.3 of TCD's LoRA. Default: none."
    ),
]
Height = Annotated[
    int | None, typer.Option(help="Of images, pixels. Default: the student's, or the pipeline's own.", min=1)
]
Width = Annotated[int | None, typer.Option(help="The same.", min=1)]
NumFrames = Annotated[int | None, typer.Option(help="Of clips; the same.", min=1)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of weights: fp32, bf16 or fp16. The autoencoder stays in float32, and a student's LoRA in lower precision an adapter."
    ),
]

Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the hub's repository that a SOURCE is, or the base of a student."),
]
Variant = Annotated[str | None, typer.Option(help="Of a pipeline's weight files, or of a student's base, e.g. fp16.")]


def quiet(debug: bool) -> None:
    """Silence the libraries that a command is about to import."""
    if not debug:
        from fewstep.distill.console import quiet

        quiet()


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Numbers of at least `least` with commas between them; a usage error otherwise."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise typer.BadParameter(f"{text!r} is not a list of numbers from {least} on such as 1,2,4", param_hint=option)
    return numbers


PANEL = "Networks that judge"


def _option(help: str) -> object:
    return typer.Option(help=help, rich_help_panel=PANEL)


InceptionWeights = Annotated[str | None, _option("Inception-v3 of FID, a file. Default: torch's cache, or downloaded.")]
ClipModel = Annotated[str, _option("A model of open_clip, a folder, or hf-hub:ORG/NAME.")]
ClipWeights = Annotated[str, _option("Of that model: a tag of open_clip, or a file.")]
DinoModel = Annotated[str, _option("DINOv2: a hub id or a folder.")]
LpipsNet = Annotated[str, _option("Backbone of LPIPS: alex, vgg or squeeze.")]
LpipsWeights = Annotated[str | None, _option("Of that backbone, a file. Default: torch's cache, or downloaded.")]
AestheticWeights = Annotated[str, _option("LAION's aesthetic head for that CLIP, a file.")]
HpsWeights = Annotated[str | None, _option("Of HPSv2, a file. Default: its package's download.")]
I3dWeights = Annotated[str, _option("I3D of FVD, a TorchScript file.")]
RaftWeights = Annotated[
    str | None,
    _option("RAFT of optical flow, large or small, a file of torchvision's. Default: its cache, or downloaded."),
]
ClipFps = Annotated[float, _option("Frames a second of the clips, for dynamic_degree.")]
ManifoldSpace = Annotated[
    str, _option("Features of precision, recall, density and manifold_coverage: inception, clip or dino.")
]
