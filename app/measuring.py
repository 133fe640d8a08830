"""The commands that measure: evaluate, stats, metrics. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.app import options
from fewstep.app.options import (
    SOURCE,
    Debug,
    Dtype,
    Eta,
    Guidance,
    Height,
    NumFrames,
    Revision,
    Scheduler,
    Timesteps,
    Variant,
    Width,
    numbers,
    quiet,
)


def evaluate(
    sources: Annotated[list[str], typer.Argument(help=f"{SOURCE} Or a folder of images.", metavar="SOURCE")],
    steps: Annotated[str, typer.Option(help="Step counts, a row for each and each source.")] = "1,2,4",
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Names of figures, with commas; fewstep metrics lists them. Default: what needs no download."
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="Images of each row.", min=4)] = 256,
    prompts: Annotated[
        str,
        typer.Option(
            help="A text file of one a line, captions as .csv, .tsv, .json or .jsonl (COCO's too), embedded:emoji, "
            "embedded:emoji/full or embedded:emoji/held-out."
        ),
    ] = "embedded:emoji",
    per_prompt: Annotated[
        int | None, typer.Option(help="Images of one prompt. Default: 1 of a table of captions, else 2 to 16.", min=1)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Real images: a folder, a .npz of mu and sigma (fewstep stats), or teacher for its own."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The report; .md, .html, .png and the folder .images stand beside it.")
    ] = Path("report.json"),
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    timesteps: Timesteps = None,
    eta: Eta = None,
    dtype: Dtype = "fp32",
    revision: Revision = None,
    variant: Variant = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    teacher_steps: Annotated[int, typer.Option(help="Of the teacher that others are compared with.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of prompts and images.", min=0, max=2**63 - 1)] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", help="Images sampled at once.", min=1)] = 16,
    judge_batch: Annotated[int, typer.Option(help="Images judged at once.", min=1)] = 32,
    cost_batches: Annotated[
        str | None, typer.Option(help="Other batch sizes to measure speed and memory at, e.g. 1,64.")
    ] = None,
    inception_weights: options.InceptionWeights = None,
    clip_model: options.ClipModel = "ViT-L-14",
    clip_weights: options.ClipWeights = "openai",
    dino_model: options.DinoModel = "facebook/dinov2-large",
    lpips_net: options.LpipsNet = "alex",
    lpips_weights: options.LpipsWeights = None,
    aesthetic_weights: options.AestheticWeights = "sac+logos+ava1-l14-linearMSE.pth",
    hps_weights: options.HpsWeights = None,
    i3d_weights: options.I3dWeights = "i3d_torchscript.pt",
    raft_weights: options.RaftWeights = None,
    clip_fps: options.ClipFps = 16,
    manifold_space: options.ManifoldSpace = "inception",
    debug: Debug = False,
) -> None:
    """Measure students, teachers and folders of images on the same prompts and noise.

    Without --metrics: with the embedded prompts fd_emoji, clip_emoji and the like; with others psnr_to_teacher, the
    distance to the teacher's many-step picture of the same noise, and pixel_distance, the variety within a prompt.

    Where some sources are PIPELINE+LORA, guidance scale, scheduler, timesteps and eta are theirs alone.

    Interrupted, it goes on where it was. On several devices: accelerate launch -m fewstep.app evaluate SOURCE ...

    Example: fewstep evaluate runs/quickstart embedded:emoji --steps 1,2,4 --num 256 --out report.json

    Example: fewstep evaluate runs/mine --prompts captions.csv --num 30000 --metrics fid,clip --reference coco-val/
    """
    counts, sizes = numbers("--steps", steps), numbers("--cost-batches", cost_batches) if cost_batches else []
    own = numbers("--timesteps", timesteps, least=0) if timesteps else None
    from fewstep.distill.metric_names import parse

    names = None if metrics is None else parse(metrics)
    quiet(debug)
    from fewstep.app.evaluate import Request
    from fewstep.app.evaluate import evaluate as run
    from fewstep.distill.metric_names import Weights

    weights = Weights(
        inception_weights=inception_weights,
        clip_model=clip_model,
        clip_weights=clip_weights,
        dino_model=dino_model,
        lpips_net=lpips_net,
        lpips_weights=lpips_weights,
        aesthetic_weights=aesthetic_weights,
        hps_weights=hps_weights,
        i3d_weights=i3d_weights,
        raft_weights=raft_weights,
        clip_fps=clip_fps,
        manifold_space=manifold_space,
    )
    run(
        Request(
            sources=sources,
            steps=counts,
            metrics=names,
            num=num,
            prompts=prompts,
            out=out,
            per_prompt=per_prompt,
            reference=reference,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed,
            teacher_steps=teacher_steps,
            batch_size=batch_size,
            judge_batch=judge_batch,
            cost_batches=sizes,
            weights=weights,
            timesteps=own,
            height=height,
            width=width,
            num_frames=num_frames,
            revision=revision,
            variant=variant,
            dtype=dtype,
            eta=eta,
        )
    )


def stats(
    folder: Annotated[str, typer.Argument(help="Images, in this folder and those below it; or clips.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="The file, which ends in .npz.")],
    space: Annotated[
        str,
        typer.Option(
            help="Feature space: inception (for fid), clip or dino; of clips frames (frame_fid) or i3d (fvd)."
        ),
    ] = "inception",
    batch_size: Annotated[int, typer.Option(help="Images judged at once.", min=1)] = 32,
    inception_weights: options.InceptionWeights = None,
    clip_model: options.ClipModel = "ViT-L-14",
    clip_weights: options.ClipWeights = "openai",
    dino_model: options.DinoModel = "facebook/dinov2-large",
    i3d_weights: options.I3dWeights = "i3d_torchscript.pt",
    debug: Debug = False,
) -> None:
    """Make the reference of a Frechet distance from a folder: mean and covariance of its images' features.

    The file is what pytorch-fid and ADM publish, too, and names the network that made it.

    Example: fewstep stats coco-val/ --out coco-val.npz
    """
    quiet(debug)
    from fewstep.app.stats import stats as run
    from fewstep.distill.metric_names import Weights

    weights = Weights(inception_weights, clip_model, clip_weights, dino_model, i3d_weights=i3d_weights)
    print(run(folder, out, space, batch_size, weights))


def metrics(debug: Debug = False) -> None:
    """List the figures of fewstep evaluate: what each says, needs, and which way is better."""
    from fewstep.distill.console import columns
    from fewstep.distill.metric_names import table

    print(columns(table()))
