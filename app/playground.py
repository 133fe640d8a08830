"""`fewstep playground`: a page, on this machine alone, with teacher and student side by side from the same noise.

A tab is a function that adds its components to the page; `page` lists them.
"""

from __future__ import annotations

import html
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from fewstep.app import sources
from fewstep.app.clips import save_mp4
from fewstep.app.sample import grid
from fewstep.app.sources import Source
from fewstep.distill import picture
from fewstep.distill.console import expected
from fewstep.distill.evaluation import Sampler, device, revisions, timed
from fewstep.samplers.baseline import counted
from fewstep.samplers.errors import UserError, reason

HOST = "127.0.0.1"
CSS = """
.picture :is(.image-container, button, .image-frame, img) { width: 100%; }
.picture img { height: auto; object-fit: contain !important; image-rendering: pixelated; }
.title, .title * { overflow: visible !important; }  /* a browser with bars that stay would show one beside the heading */
.centred { text-align: center; }
.cost { min-height: 4em; }
input[type=radio]:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
"""
ABOUT = "NFE: rows that went through the network for one picture; a step with guidance counts two."


def playground(
    names: Sequence[str], port: int, revision: str | None = None, variant: str | None = None, dtype: str = "fp32"
) -> None:
    """Load the sources, by default the embedded teacher and the newest student, and serve the page until Ctrl-C.

    Raises:
        UserError: a port that is taken, a source that is none; before anything is served.
    """
    check_port(port)
    note = None
    if not names:
        newest = sources.newest_student()
        names, note = [sources.EMBEDDED_TEACHER], sources.NO_STUDENT
        if newest is not None:
            names, note = [*names, newest], None
    files = revisions(names, revision)
    sources.check(names, files)
    demo = page([sources.load_source(name, files[name], variant, dtype) for name in sources.shown(names)], note)
    if note is not None:
        print(note)
    url = start(demo, port)
    print(f"{url}  (Ctrl-C stops it)", flush=True)
    try:
        wait()
    except KeyboardInterrupt:
        print()
    finally:
        demo.close(verbose=False)


def check_port(port: int) -> None:
    """Refuse a port that is taken, as the server would only after everything has been loaded."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left may be taken again
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be used ({error.strerror}); name another") from error


def wait() -> None:
    """Forever."""
    threading.Event().wait()


def start(demo: Any, port: int) -> str:
    """Serve a page from another thread; its address."""
    import gradio as gr

    # gradio asks the page whether it is up, and would ask a proxy
    skipped = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{skipped},{HOST}" if skipped else HOST
    # files of gradio's own; in its default the semi-bold one lacks most letters
    text = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    _, url, _ = demo.launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(font=[text, "system-ui", "sans-serif"]),
        css=CSS,
    )
    return url


def page(shown: Sequence[Source], note: str | None = None) -> Any:
    """The page: a tab for each source, and a line under it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and at each launch
    import gradio as gr

    stop = threading.Event()
    with gr.Blocks(title="fewstep playground", delete_cache=(3600, 24 * 3600), analytics_enabled=False) as demo:
        gr.Markdown("# fewstep playground", elem_classes="title")
        with gr.Tabs():
            for i, source in enumerate(shown):
                with gr.Tab(source.name):
                    comparison(source, f"sample_{i}" if i else "sample", stop)
        gr.Markdown(ABOUT if note is None else f"{ABOUT}<br>{note[0].upper()}{note[1:]}.")
    return demo


def comparison(source: Source, endpoint: str, stop: threading.Event) -> None:
    """A tab: what to draw above, teacher and student side by side below; programs ask `endpoint`."""
    import gradio as gr

    gr.Markdown(about(source))
    with gr.Row(equal_height=True, visible=bool(source.prompts)):
        prompt = gr.Textbox(next(iter(source.prompts), ""), label="Prompt", max_lines=1)
    with gr.Row(equal_height=True):
        steps = gr.Radio(
            list(source.step_counts), value=_usual(source.step_counts), label="Steps", scale=3, min_width=260
        )
        seed = gr.Number(0, label="Seed", precision=0, scale=1, min_width=100)
        highest = max(100, source.many_steps)
        many = gr.Slider(1, highest, source.many_steps, step=1, label="Teacher's many steps", scale=3, min_width=270)
        takes = source.guidance_scale is not None
        guidance = gr.Number(source.guidance_scale, label="Guidance", scale=1, min_width=110, visible=takes)
        with gr.Column(scale=1, min_width=120):
            button = gr.Button("Sample", variant="primary")
            halt = gr.Button("Stop")
    with gr.Accordion("Size", open=False, visible=bool(source.size)), gr.Row():
        sides = [
            gr.Number(source.size.get(k), label=label, precision=0, minimum=1, visible=k in source.size)
            for k, label in (("height", "Height"), ("width", "Width"), ("num_frames", "Frames"))
        ]
    outputs: list[Any] = []
    with gr.Row():
        for label in source.labels:
            with gr.Column(min_width=220):
                outputs += column(label, source.clips)
    event = {
        "fn": requests(source, stop),
        "inputs": [prompt, seed, steps, many, guidance, *sides],
        "outputs": outputs,
        "concurrency_id": "device",  # one request at a time, whichever tab it comes from
        "trigger_mode": "always_last",  # what is asked for while another is drawn comes after it
        "show_progress": "minimal",
        "show_progress_on": [c for c in outputs if isinstance(c, gr.Image)],
    }
    gr.on([button.click, prompt.submit, seed.submit], **event, api_name=endpoint)
    halt.click(stop.set, queue=False, show_progress="hidden", api_visibility="private")
    if len(source.prompts) > 1:
        examples = gr.Examples([[p] for p in source.prompts], [prompt], label="Examples", api_visibility="private")
        examples.load_input_event.then(**event, api_name=f"{endpoint}_example", api_visibility="private")


def column(label: str, clips: bool) -> list[Any]:
    """[A clip's player,] a picture and its cost, under a heading."""
    import gradio as gr

    gr.Markdown(f"### {label}", elem_classes="centred")
    player = [gr.Video(show_label=False, autoplay=True, loop=True, interactive=False, buttons=[])] if clips else []
    image = gr.Image(
        show_label=False,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="picture",
    )
    return [*player, image, gr.Markdown(elem_classes="centred cost")]


def about(source: Source) -> str:
    """What a tab shows, in one line."""
    teacher = f"**{source.teacher.source}**"
    if source.student is None:
        return f"The teacher {teacher} in many and in few steps, from the same noise. On {device()}."
    manifest = source.student[1]
    made = f"{manifest.method}, {'LoRA' if manifest.kind == 'lora' else 'full'}"
    return f"The student **{source.name}** ({made}) beside its teacher {teacher}, from the same noise. On {device()}."


def _usual(step_counts: Sequence[int]) -> int:
    """The largest count up to 4, else the smallest."""
    return max((k for k in step_counts if k <= 4), default=step_counts[0])


def requests(source: Source, stop: threading.Event) -> Callable[..., Iterator[list[str | None]]]:
    """What a request to draw answers: of each column [a clip,] a picture and its cost, as soon as they are there."""
    import gradio as gr

    columns, each = len(source.labels), 3 if source.clips else 2

    def sample(
        prompt: str,
        seed: int | None,
        steps: int | None,
        many_steps: int,
        guidance_scale: float | None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
    ) -> Iterator[list[str | None]]:
        """Draw the columns' pictures of a prompt from the noise of a seed."""
        try:
            if source.prompts and not prompt.strip():
                raise UserError("no prompt: write what to draw")
            if seed is None or steps is None:
                raise UserError(f"no {'seed' if seed is None else 'steps'}: say a number")
            if not 0 <= seed < 2**63:
                raise UserError(f"seed {seed}: must be a whole number from 0 to 9223372036854775807")
            if (guidance_scale or 0) < 0:
                raise UserError(f"guidance {guidance_scale:g}: must be 0 or more")
            scale = source.guidance_scale if guidance_scale is None else guidance_scale
            asked = {"height": height, "width": width, "num_frames": num_frames}
            size: dict[str, Any] = {k: v for k, v in asked.items() if v not in (None, source.size.get(k))}
            stop.clear()
            answer: list[str | None] = [None] * (each * columns)  # the pictures of the request before go
            yield answer
            with TemporaryDirectory() as folder:  # gradio copies what is yielded
                for i in reversed(range(columns)):  # the quick ones come first
                    sampler = source.sampler(
                        source.labels[i], steps, int(many_steps or source.many_steps), scale, **size
                    )
                    try:
                        with stopped_by(stop, sampler.networks):
                            answer[each * i : each * (i + 1)] = drawn(sampler, prompt, seed, Path(folder), size)
                    except Stopped:
                        answer[each * (i + 1) - 1] = "stopped"
                        yield answer
                        break
                    yield answer
        except Exception as error:
            if expected(error) is None:
                traceback.print_exc()
            raise gr.Error(one_line(error), print_exception=False) from error

    return sample


class Stopped(Exception):
    """The user wants no more of a request."""


@contextmanager
def stopped_by(event: threading.Event, networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the networks' next call after the event ends in `Stopped`."""

    def ask(*args: Any) -> None:
        if event.is_set():
            raise Stopped

    handles = [network.register_forward_pre_hook(ask) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn(sampler: Sampler, prompt: str, seed: int, folder: Path, size: Mapping[str, int | None]) -> list[str]:
    """Files in `folder`, [an MP4,] a picture (of a clip its frames), and what it cost."""
    with counted(sampler.networks) as rows:
        images, seconds = timed(sampler, [prompt], [seed])
    steps = f"{sampler.steps} step{'s' if sampler.steps != 1 else ''}"
    guided = f", guidance {sampler.guidance:g}" if sampler.guidance != 1 else ""
    sides = "".join(f", {k.replace('_', ' ')} {v}" for k, v in size.items())
    file = folder / f"{sampler.role}-{steps.replace(' ', '-')}-seed-{seed}.png"
    picture.save(grid(images, 1), file)
    clip = []
    if images.ndim == 5:
        clip = [str(save_mp4(images[0], file.with_suffix(".mp4"), sampler.frames_per_second))]
    return [
        *clip,
        str(file),
        f"**{sum(rows)} NFE, {seconds:.3f} s**<br>{steps}, {sampler.scheduler}{guided}, seed {seed}{sides}",
    ]


def one_line(error: Exception) -> str:
    """What a page says of an error."""
    text = reason(error)
    return html.escape(text if expected(error) is not None else f"{type(error).__name__}: {text}", quote=False)
