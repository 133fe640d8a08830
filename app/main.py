"""The command line. Every command imports what it needs when it runs, so that help and refusals answer at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fewstep.app import measuring
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

app = typer.Typer(
    name="fewstep",
    help="Distil a diffusers pipeline (the teacher) into a student that samples in one to four steps, measure what was "
    "kept, and use it in plain diffusers.\n\n"
    "A first try, some minutes on two cores: fewstep train quickstart",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one, e.g. quickstart.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set, e.g. max_train_steps=200."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config, the roles and the cost; train nothing.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it needs in memory, and what else would fit; load nothing.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="Of one device, for --plan, e.g. 24GiB. Default: that of the GPU.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="That the sharded rows of --plan count with. Default: 8.", min=2)
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a student.

    The run is written to runs/NAME: checkpoints, previews, the student, and with report_num=N a report that compares
    N images of it with its teacher's. Ctrl-C saves a checkpoint.

    On several devices: accelerate launch -m fewstep.distill CONFIG, or torchrun --nproc_per_node 2 -m fewstep.distill
    CONFIG
    """
    from fewstep.distill.console import plan_command, train_command

    if plan:
        if resume or dry_run:
            raise typer.BadParameter("trains nothing; leave out --resume and --dry-run", param_hint="--plan")
        plan_command(config, overrides or (), memory, devices or 8, debug)
    elif memory is not None:
        raise typer.BadParameter("goes with --plan", param_hint="--memory")
    elif devices is not None:
        raise typer.BadParameter(
            "goes with --plan; torchrun and accelerate launch start several", param_hint="--devices"
        )
    else:
        train_command(config, overrides or (), resume, dry_run, debug)


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help=SOURCE, metavar="SOURCE")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A text file, one prompt a line.", metavar="FILE")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. Default: 4, or as many as --timesteps.", min=1)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first image of a prompt; the next has the next.", min=0, max=2**63 - 1)
    ] = 0,
    n: Annotated[int, typer.Option("-n", help="Images of each prompt.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="The picture: .png, .jpg, and for clips .mp4, .webp or .gif.")] = Path(
        "sample.png"
    ),
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    timesteps: Timesteps = None,
    eta: Eta = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Of a teacher, what guidance leads away from. Default: none.")
    ] = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    dtype: Dtype = "fp32",
    revision: Revision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Sample images into one picture, a row for each prompt.

    A student follows its own plan. A teacher runs its stock pipeline.

    Example: fewstep sample runs/quickstart -p "a fruit on a blue background" --steps 2 --out fruit.png

    Example: fewstep sample stable-diffusion-v1-5/stable-diffusion-v1-5+latent-consistency/lcm-lora-sdv1-5 -p "a cat"
    --scheduler lcm --guidance-scale 1
    """
    own = numbers("--timesteps", timesteps, least=0) if timesteps else None
    steps = steps or (len(own) if own else 4)
    quiet(debug)
    from fewstep.app.sample import sample as run

    drawn = (source, prompt or [], prompts, steps, seed, n, out, guidance_scale, scheduler, own)
    how: dict[str, Any] = {"revision": revision, "variant": variant, "dtype": dtype, "eta": eta}
    how |= {"negative_prompt": negative_prompt, "height": height, "width": width, "num_frames": num_frames}
    number = run(*drawn, **how)
    print(f"{out}: {number} image{'s' if number != 1 else ''} in {steps} step{'s' if steps != 1 else ''}")


app.command()(measuring.evaluate)
app.command()(measuring.stats)
app.command()(measuring.metrics)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run or a student's folder.", metavar="RUN")],
    out: Annotated[Path, typer.Argument(help="A new folder.", metavar="OUT")],
    format: Annotated[
        str,
        typer.Option(
            help="diffusers: the student's own folder, for load_lora_weights or from_pretrained. "
            "fused: a whole pipeline, the LoRA added into its weights. peft: the LoRA alone, for PeftModel."
        ),
    ] = "diffusers",
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Also send OUT, card included, to this model repository of the hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, if it is new.")] = False,
    revision: Revision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Write a student for use elsewhere.

    Example: fewstep export runs/quickstart my-model --format fused --push me/my-model
    """
    if private and push is None:
        raise typer.BadParameter("goes with --push", param_hint="--private")
    quiet(debug)
    from fewstep.app import export as exporting

    if push is not None:
        exporting.refuse_name(push)
    for line in exporting.export(run, format, out, revision, variant):
        print(line)
    if push is not None:
        print(f"sent to {exporting.push(out, push, private)}")


@app.command()
def playground(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{SOURCE} Default: the embedded teacher and the newest student under runs/.", metavar="SOURCE"
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the page, on 127.0.0.1.", min=1, max=65535)] = 7860,
    dtype: Dtype = "fp32",
    revision: Revision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Open a page that draws: teacher and student side by side, from the same noise.

    It is served on this machine alone and needs no network. Ctrl-C stops it.

    Example: fewstep playground runs/quickstart
    """
    quiet(debug)
    from fewstep.app.playground import playground as serve

    serve(sources or [], port, revision, variant, dtype)


@app.command()
def methods(debug: Debug = False) -> None:
    """List the methods of distillation: what each needs, trains and costs."""
    from fewstep.app import tables
    from fewstep.distill.console import WIDTH, columns, paragraph

    print(columns(tables.methods(), WIDTH))
    print(
        "\nnetworks: held in memory, in units of the teacher's; as LoRA one base + the LoRAs on it"
        "\nforwards / backwards: rows through a network over the batch, in an iteration where all step, or one"
        "\nwithout the student"
        f"\nsteps: {tables.steps()}"
        f"\n{paragraph(tables.several(), WIDTH)}"
    )


@app.command()
def backbones(debug: Debug = False) -> None:
    """List the pipelines that can be teachers, and the students that each method makes of them."""
    from fewstep.app import tables
    from fewstep.distill.console import WIDTH, blocks, columns, paragraph

    matrix, notes = tables.matrix()
    print(columns(tables.backbones(), WIDTH), "", sep="\n")
    for block in blocks(matrix, WIDTH):
        print(columns(block), "", sep="\n")
    print(*(paragraph(line, WIDTH) for line in tables.remarks(notes)), sep="\n")


@app.command()
def cite(
    run: Annotated[str, typer.Argument(help="A run or a student's folder.", metavar="RUN")], debug: Debug = False
) -> None:
    """Print the BibTeX of the papers behind a run."""
    from fewstep.app.cite import cite as bibtex

    print(bibtex(run))


def main() -> None:
    """`fewstep`: run a command, and exit with 0, with 2 after a mistake of the user's, or with 130 when interrupted."""
    from fewstep.distill.console import answer

    sys.exit(answer(lambda: _run(sys.argv[1:] or ["--help"]), "--debug" in sys.argv))


def _run(arguments: list[str]) -> None:
    usage = cast(type[Exception], typer.BadParameter.__mro__[2])  # click's ClickException, which typer has moved about
    try:
        app(arguments, prog_name="fewstep", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fewstep"
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        print(f"{command}: {message}; see {command} --help", file=sys.stderr)
        sys.exit(2)
