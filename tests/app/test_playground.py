"""The page, asked by gradio's own client: its pixels are those of `fewstep sample`, and no request ends it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from fewstep.app import playground, sources
from fewstep.samplers.load import resolve
from tests.app.conftest import Answer
from tests.app.test_clips import frames
from tests.app.test_commands import PROMPTS, pixels
from tests.app.test_main import refused
from tests.samplers.students import saved

Command = Callable[..., Answer]
PROMPT = PROMPTS[0]


class Page(NamedTuple):
    """A page that is served, and a client of it."""

    url: str
    client: Any
    clip: Path

    def ask(self, tab: str, **inputs: Any) -> list[Any]:
        """Final outputs of a request: of each column [a clip,] a picture, a text."""
        return list(self.client.predict(**{"prompt": PROMPT} | inputs, api_name=tab))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((playground.HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page(trained: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Tabs /sample: the trained student, /sample_1: the teacher alone, /sample_2: a student that makes clips."""
    from gradio_client import Client

    clip = saved(tmp_path_factory.mktemp("clip"), "wan-lora").folder
    demo = playground.page([sources.load_source(str(s)) for s in (trained, teacher, clip)])
    url = playground.start(demo, free_port())
    client = Client(url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    yield Page(url, client, clip)
    client.close()
    demo.close(verbose=False)


def test_a_student_is_what_sample_draws(page: Page, fewstep: Command, trained: Path, tmp_path: Path):
    many, _, few, few_said, student, said = page.ask("/sample", seed=5, steps=2, many_steps=3)
    out = tmp_path / "a.png"
    assert fewstep("sample", trained, "-p", PROMPT, "--seed", 5, "--steps", 2, "-n", 1, "--out", out).code == 0
    assert np.array_equal(pixels(Path(student)), pixels(out))
    assert re.fullmatch(r"\*\*2 NFE, \d+\.\d{3} s\*\*<br>2 steps, consistency, seed 5", said)
    # the teacher of the same size, with the guidance of the run
    assert pixels(Path(many)).shape == pixels(Path(few)).shape == (64, 64, 3)
    assert re.fullmatch(r"\*\*4 NFE, .*<br>2 steps, dpmsolver\+\+ \(trailing\), guidance 3, seed 5", few_said)


def test_a_teacher_is_what_sample_draws(page: Page, fewstep: Command, teacher: Path, tmp_path: Path):
    """In many and in few steps, from the noise of the seed, with and without guidance: two or one rows a step."""
    for guidance, rows in ((None, 2), (2, 2), (1, 1)):
        given = {} if guidance is None else {"guidance_scale": guidance}
        many, many_said, few, few_said = page.ask("/sample_1", seed=3, steps=2, many_steps=6, **given)
        for picture, said, steps in ((many, many_said, 6), (few, few_said, 2)):
            out = tmp_path / f"{guidance}-{steps}.png"
            options = [] if guidance is None else ["--guidance-scale", guidance]
            command = ("sample", teacher, "-p", PROMPT, "--seed", 3, "--steps", steps, "-n", 1, "--out", out)
            assert fewstep(*command, *options).code == 0
            assert np.array_equal(pixels(Path(picture)), pixels(out))
            assert said.startswith(f"**{rows * steps} NFE, ")


def test_pictures_come_one_by_one_and_the_students_first(page: Page):
    job = page.client.submit(prompt=PROMPT, seed=0, steps=4, many_steps=2, api_name="/sample")
    job.result()
    there = [[bool(o) for o in out[::2]] for out in job.outputs()]
    assert there[0] == [False, False, False]
    assert there[1] == [False, False, True]
    assert there[-1] == [True, True, True]


def test_a_size_is_that_of_every_column(page: Page, fewstep: Command, trained: Path, tmp_path: Path):
    size, out = {"height": 32, "width": 96}, tmp_path / "a.png"
    *others, student, said = page.ask("/sample", seed=5, steps=2, many_steps=3, **size)
    assert said.endswith("consistency, seed 5, height 32, width 96")
    options = ("-p", PROMPT, "--seed", 5, "--steps", 2, "-n", 1, "--height", 32, "--width", 96, "--out", out)
    assert fewstep("sample", trained, *options).code == 0
    assert np.array_equal(pixels(Path(student)), pixels(out))
    assert [pixels(Path(p)).shape for p in others[::2]] == [(32, 96, 3)] * 2
    *_, frames_, _ = page.ask("/sample_2", seed=1, steps=4, many_steps=1, num_frames=9)
    assert pixels(Path(frames_)).shape == (64, 9 * 64, 3)


def test_a_request_that_is_stopped_keeps_what_is_there(trained: Path):
    stop = threading.Event()
    sample = playground.requests(sources.load_source(str(trained)), stop)
    request = sample(PROMPT, 0, 2, 50, None)
    stop.set()  # of the request before
    assert next(request) == [None] * 6
    assert all(next(request)[4:])
    stop.set()
    few, few_said, student, said = next(request)[2:]
    assert (few, few_said) == (None, "stopped")
    assert Path(student).is_file()
    assert said.startswith("**2 NFE")
    assert not list(request)
    assert all(list(sample(PROMPT, 0, 2, 3, None))[-1])


def test_controls_offer_what_the_source_has(page: Page, trained: Path):
    """Step counts of the manifest, many steps and guidance of the run's report; a pipeline takes any count."""
    parts = page.client.config["components"]
    counts = [[value for _, value in p["props"]["choices"]] for p in parts if p["type"] == "radio"]
    assert counts == [[2, 4], [1, 2, 4, 8], [1, 4]]
    props = {
        (p["type"], p["props"]["label"]): p["props"]["value"]
        for p in reversed(parts)
        if {"label", "value"} <= p["props"].keys()
    }
    assert props["slider", "Teacher's many steps"] == 8
    assert props["number", "Guidance"] == 3


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"prompt": " "}, "no prompt: write what to draw"),
        ({"seed": None}, "no seed: say a number"),
        ({"seed": -1}, "seed -1: must be a whole number"),
        ({"steps": 3}, r"3 .* not in the list of choices: \[2, 4\]"),
        ({"many_steps": 0}, "0 is less than"),
        ({"height": 63}, "both must be divisible by"),
    ],
)
def test_a_failing_request_is_one_line_and_the_page_lives(page: Page, inputs: dict[str, Any], said: str):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=said) as error:
        page.ask("/sample", **{"steps": 2, "seed": 0, "many_steps": 2} | inputs)
    assert "\n" not in str(error.value)
    assert page.ask("/sample", steps=2, seed=0, many_steps=2)[4]


def test_a_bug_is_one_line_on_the_page_and_a_traceback_in_the_terminal(
    page: Page, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from gradio_client.exceptions import AppError

    def fail(*_: object) -> None:
        raise RuntimeError("\n<out> of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(playground, "drawn", fail)
        with pytest.raises(AppError) as error:
            page.ask("/sample", steps=2, seed=0)
    assert str(error.value) == "RuntimeError: &lt;out&gt; of memory"  # the page reads it as HTML
    assert capfd.readouterr().err.count("Traceback") == 1
    assert page.ask("/sample", steps=2, seed=0, many_steps=2)[4]


def test_a_clip_plays_beside_its_frames(page: Page, fewstep: Command, tmp_path: Path):
    video, picture, said = page.ask("/sample_2", seed=1, steps=4, many_steps=4)[-3:]
    out = tmp_path / "a.png"
    assert fewstep("sample", page.clip, "-p", PROMPT, "--seed", 1, "--steps", 4, "-n", 1, "--out", out).code == 0
    assert np.array_equal(pixels(Path(picture)), pixels(out))
    assert said.startswith("**8 NFE, ")  # its plan has guidance
    mp4 = out.with_suffix(".mp4")
    assert fewstep("sample", page.clip, "-p", PROMPT, "--seed", 1, "--steps", 4, "-n", 1, "--out", mp4).code == 0
    assert np.array_equal(frames(mp4)[1], frames(Path(video["video"] if isinstance(video, dict) else video))[1])
    path = Path(video["video"] if isinstance(video, dict) else video)
    assert path.suffix == ".mp4"
    meta, played = frames(path)
    assert meta["fps"] == 16
    drawn = pixels(out).reshape(64, 5, 64, 3).swapaxes(0, 1)
    assert played.shape == drawn.shape
    # noise is what video codecs keep worst; still each frame is nearest to itself
    distance = np.abs(played[:, None] - drawn[None]).mean((2, 3, 4))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3, 4]


def test_nothing_comes_from_elsewhere(page: Page, monkeypatch: pytest.MonkeyPatch):
    """No script, style, font or picture of another host; no analytics, whatever the environment says."""
    texts = [httpx.get(f"{page.url}{path}").text for path in ("", "theme.css")]
    config = httpx.get(f"{page.url}config").json()
    for text in [*texts, *config["stylesheets"], str(config["css"])]:
        assert not re.search(r"""(?:src|href)=["']https?:|url\(["']?https?:|@import""", text)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    demo = playground.page([])
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not demo.analytics_enabled


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was served at the moment that the command began to wait; then comes Ctrl-C."""
    found: list[dict[str, Any]] = []
    started: list[str] = []
    start = playground.start

    def note(demo: Any, port: int) -> str:
        started.append(start(demo, port))
        return started[-1]

    def interrupt() -> None:
        found.append(httpx.get(f"{started[-1]}config").json())
        raise KeyboardInterrupt

    monkeypatch.setattr(playground, "start", note)
    monkeypatch.setattr(playground, "wait", interrupt)
    return found


def tabs(config: dict[str, Any]) -> list[str]:
    return [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]


def test_alone_it_shows_the_embedded_teacher_and_says_how_to_make_a_student(
    fewstep: Command, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    port = free_port()
    answer = fewstep("playground", "--port", port)
    line = "no student under runs/ yet; make one: fewstep train quickstart\n"
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == f"{line}http://127.0.0.1:{port}/  (Ctrl-C stops it)\n\n"
    assert tabs(served[0]) == ["embedded:emoji"]
    assert "fewstep train quickstart" in str(served[0]["components"])
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")


def test_alone_it_shows_the_newest_student(
    fewstep: Command,
    served: list[dict[str, Any]],
    trained: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "c", "b")):
        folder = tmp_path / "runs" / name / "student"
        shutil.copytree(trained / "student", folder)
        os.utime(folder / "fewstep.json", (1_000_000 + i,) * 2)
    (tmp_path / "runs" / "d" / "checkpoints").mkdir(parents=True)  # a run that has none yet
    assert sources.newest_student() == "runs/b"
    assert fewstep("playground", "--port", free_port()).code == 0
    assert tabs(served[0]) == ["runs/b", "embedded:emoji"]
    # a teacher that stands beside its student needs no tab, however it is spelt
    assert sources.shown([os.path.relpath(teacher), "runs/b", str(teacher), "runs/b"]) == ["runs/b"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/where/at/all", "no/where/at/all: no such folder"),
        ("embedded:emojis", "embedded:emojis: no such embedded teacher"),
        ("unfinished", "unfinished: this run has no student yet"),
        ("broken", "broken: cannot be loaded as StableDiffusionPipeline"),
        ("orphan", "orphan: its base cannot be loaded; gone: no such folder"),
    ],
)
def test_a_source_that_is_none_is_one_line(
    fewstep: Command,
    trained: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    said: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "unfinished" / "config.yaml").touch()
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    shutil.copytree(trained / "student", tmp_path / "orphan")
    manifest = tmp_path / "orphan" / "fewstep.json"
    manifest.write_text(re.sub(r'"base": "[^"]*"', '"base": "gone"', manifest.read_text()))
    refused(fewstep("playground", source, "--port", free_port()), said)


def test_a_taken_port_is_one_line(fewstep: Command, teacher: Path):
    with socket.socket() as other:
        other.bind((playground.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        refused(fewstep("playground", teacher, "--port", port), f"--port {port}: cannot be used", "name another")


def test_examples_are_what_a_run_was_made_for(tmp_path: Path):
    """Prompts of the run's previews first, then those that its teacher's folder carries, whatever the folder is called."""
    from fewstep.distill.prompt_sets import EMBEDDED, example_captions

    copied = shutil.copytree(resolve("embedded:emoji"), tmp_path / "mine")
    for base in ("embedded:emoji", str(copied)):
        assert sources.examples(base, ["a bird"]) == ["a bird", *example_captions()]
        assert sources.examples(base) == example_captions()
    assert [sum(c in captions() for c in example_captions()) for captions in EMBEDDED.values()] == [2, 2, 2]
    (copied / "prompts.txt").unlink()
    for base in (str(copied), "org/name"):
        assert sources.examples(base) == list(sources.PROMPTS)
        assert sources.examples(base, None, ["207"]) == ["207"]
