"""The command line: quick help, one line and exit code 2 for what a user can get wrong, and the train command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.app.conftest import Answer
from tests.pipelines import tiny_ddpm

Command = Callable[..., Answer]


def refused(answer: Answer, *parts: str, lines: int = 1) -> None:
    """Exit code 2, that many lines on stderr and nothing else, the parts among them."""
    assert answer.code == 2
    assert answer.out == ""
    assert len(answer.err.splitlines()) == lines, answer.err
    for part in parts:
        assert part in answer.err


HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "peft", "PIL", "gradio", "torchmetrics", "yaml"}
"""Each of them takes longer to import than help may take, or brings what does."""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["playground", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    """Half a second, which a loaded machine cannot be held to; what it imports, it can."""
    code = f"""
import sys
sys.argv = ["fewstep", *{arguments!r}]
from fewstep.app.main import main
try:
    main()
finally:
    found = {HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}}
    assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: fewstep" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["learing_rate=1"], ["tiny.yaml: learing_rate: unknown key; did you mean learning_rate?"]),
        (["rank=many"], ["tiny.yaml: rank:", "integer", "'many'"]),
        (["method=dmd3"], ["method: 'dmd3' is unknown; did you mean dmd?", "lcm"]),
        (["rank"], ["rank: an override is key=value"]),
        (["teacher=no/where/at/all"], ["no/where/at/all: no such folder"]),
        (["teacher=embedded:emojis"], ["embedded:emojis: no such embedded teacher"]),
        (["prompts=missing.txt"], ["missing.txt: cannot be read"]),
        (["aspect_ratio_buckets=64;64"], ["aspect_ratio_buckets: must be true, false, or sizes as"]),
        (["num_frames=5"], ["num_frames: 5; this teacher makes images, leave it out"]),
        (["report_scheduler=dpm"], ["scheduler 'dpm' is unknown; allowed: own, ddim"]),
        (["height=32"], ["report_prompts: embedded:emoji is judged by images of 64x64 pixels", "images of 32x64"]),
        (["report_prompts=[embedded:emojis]"], ["embedded:emojis: no such embedded prompts; shipped: embedded:emoji,"]),
    ],
)
def test_a_wrong_config_is_one_line(fewstep: Command, config: Path, overrides: list[str], parts: list[str]):
    refused(fewstep("train", config, "--dry-run", *overrides), *parts)


def test_every_mistake_of_a_config_has_its_line(fewstep: Command, config: Path):
    answer = fewstep("train", config, "learing_rate=1", "rank=0", "report_steps=[0]")
    refused(answer, "learing_rate", "rank", "report_steps.0", lines=3)


def test_a_missing_config_names_the_near_one(fewstep: Command):
    refused(fewstep("train", "quikstart"), "quikstart: no such config file", "did you mean quickstart?")


def test_usage_errors_are_one_line(fewstep: Command):
    refused(fewstep("trian"), "fewstep: No such command 'trian'", "fewstep --help")
    refused(fewstep("train"), "fewstep train:", "CONFIG", "fewstep train --help")
    refused(fewstep("sample", "x", "--steps", "four"), "fewstep sample:", "--steps")
    refused(fewstep("sample", "x", "--sede", "4"), "fewstep sample: No such option: --sede")
    refused(fewstep("evaluate", "x", "--steps", "1,two"), "--steps", "'1,two'", "1,2,4")


def test_no_arguments_print_the_help(fewstep: Command):
    answer = fewstep()
    assert answer.code == 0
    assert "fewstep train quickstart" in answer.out


def test_a_teacher_of_an_unsupported_class_names_the_supported(fewstep: Command, config: Path, broken: Path):
    index = broken / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    refused(
        fewstep("train", config, "--dry-run", f"teacher={broken}"),
        "KandinskyPipeline is not supported; supported: ConsistencyModelPipeline",
        "WanPipeline",
    )


def test_corrupt_weights_are_one_line(fewstep: Command, config: Path, broken: Path):
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(fewstep("train", config, "--dry-run", f"teacher={broken}"), str(broken), "cannot be loaded")
    refused(fewstep("sample", broken, "-p", "a cat"), str(broken), "cannot be loaded")


def test_an_empty_prompt_file_is_one_line(fewstep: Command, config: Path, trained: Path, tmp_path: Path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for arguments in (
        ("train", config, "--dry-run", f"prompts={empty}"),
        ("train", config, "--dry-run", f"report_prompts=[{empty}]"),
        ("sample", trained, "--prompts", empty),
        ("evaluate", trained, "--prompts", empty, "--steps", 4),
    ):
        refused(fewstep(*arguments), f"{empty}: the file holds no prompt; one a line is expected")


def test_a_lora_of_another_base_is_one_line(fewstep: Command, trained: Path, broken: Path, tmp_path: Path):
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: 1.3 * v for k, v in load_file(path).items()}, path)
    student = Path(shutil.copytree(trained / "student", tmp_path / "student"))
    manifest = json.loads((student / "fewstep.json").read_text())
    (student / "fewstep.json").write_text(json.dumps(manifest | {"base": str(broken)}))
    refused(fewstep("sample", student, "-p", "a cat"), "a LoRA of another base", str(broken))


def test_steps_that_a_student_has_not_are_one_line(fewstep: Command, trained: Path, config: Path, tmp_path: Path):
    said = "steps 3: this student samples in 2, 4 steps"
    refused(fewstep("sample", trained, "-p", "a cat", "--steps", 3, "--out", tmp_path / "a.png"), said)
    refused(fewstep("evaluate", trained, "--steps", "4,3", "--out", tmp_path / "r.json"), said)
    assert not any(tmp_path.iterdir())
    # and a report that could not be made is refused before the training that it would follow
    refused(fewstep("train", config, "name=other", "report_steps=[4,1]"), "report_steps: 1 is not", "it has 2, 4")


def test_a_run_that_is_there_is_not_overwritten(fewstep: Command, trained: Path, config: Path):
    before = (trained / "metrics.jsonl").read_bytes()
    refused(fewstep("train", config), str(trained), "--resume", "name=")
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_debug_adds_the_traceback(fewstep: Command, config: Path):
    plain, debug = (fewstep("train", config, "rank=many", *more) for more in ([], ["--debug"]))
    assert debug.code == plain.code == 2
    assert debug.err.startswith("Traceback")
    assert debug.err.endswith(plain.err)


def test_an_interrupted_run_says_its_line_and_exits_with_130(
    fewstep: Command, config: Path, monkeypatch: pytest.MonkeyPatch
):
    from fewstep.distill import run
    from fewstep.distill.trainer import Interrupted

    def stop(*_: object) -> None:
        raise Interrupted("stopped at iteration 1 of 2; go on with --resume")

    monkeypatch.setattr(run, "train", stop)
    assert fewstep("train", config) == (130, "", "stopped at iteration 1 of 2; go on with --resume\n")


def test_a_device_that_is_too_small_is_one_line(fewstep: Command, config: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from fewstep.distill import run

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(run, "train", fail)
    assert fewstep("train", config) == (2, "", "CUDA out of memory. Tried to allocate 2.00 GiB.\n")


def test_a_bug_is_no_user_error(fewstep: Command, config: Path, monkeypatch: pytest.MonkeyPatch):
    """Its traceback must reach the one who can report it."""
    from fewstep.distill import run

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        fewstep("train", config)


def test_a_dry_run_prints_config_roles_and_cost_and_writes_nothing(fewstep: Command, config: Path, tmp_path: Path):
    answer = fewstep("train", config, "--dry-run", f"output_dir={tmp_path / 'runs'}", "fake_score_updates=3")
    assert (answer.code, answer.err) == (0, "")
    resolved, roles, cost, where = answer.out.split("\n\n")
    values = yaml.safe_load(resolved)
    assert (values["fake_score_updates"], values["rank"], values["adam_beta2"]) == (3, 2, 0.999)
    trained = {line.split()[0]: line.split()[-1] for line in roles.splitlines()[1:]}
    assert trained["teacher"] == "frozen"
    assert trained["student"] == trained["fake_score"] != "frozen"
    # of 2 or 4 steps the rollout stops at a uniform one, (1/2 + 3/2) / 2 = 1 call before it without a graph;
    # then the student, teacher with guidance (2), fake score, and its own loss; backwards of student and fake score
    assert "student and fake_score     6         2" in cost
    assert str(tmp_path / "runs" / "tiny") in where
    assert not any(tmp_path.iterdir())


def test_a_plan_prints_what_fits_and_writes_nothing(fewstep: Command, config: Path, tmp_path: Path):
    answer = fewstep("train", config, "--plan", "--memory", "24GiB", f"output_dir={tmp_path / 'runs'}")
    assert (answer.code, answer.err) == (0, "")
    assert "this config: LoRA on a shared base, 0." in answer.out
    assert "which fits" in answer.out
    assert not any(tmp_path.iterdir())
    refused(fewstep("train", config, "--plan", "--memory", "much"), "--memory much", "such as 24GiB")
    refused(fewstep("train", config, "--memory", "24GiB"), "--memory", "goes with --plan")
    refused(fewstep("train", config, "--devices", "4"), "--devices", "goes with --plan", "torchrun")
    refused(fewstep("train", config, "--plan", "--resume"), "--plan", "trains nothing")
    refused(fewstep("export", "run", "out", "--private"), "--private", "goes with --push")


def test_a_run_is_no_config(fewstep: Command, trained: Path):
    """Its folder is named where its config was meant."""
    refused(fewstep("train", trained, "--resume"), f"did you mean {trained / 'config.yaml'}?")


def test_a_folder_that_lacks_a_tokenizer_is_refused(fewstep: Command, broken: Path, tmp_path: Path):
    """transformers would make an empty one, and every prompt would be noise."""
    shutil.rmtree(broken / "tokenizer")
    refused(fewstep("sample", broken, "-p", "a cat", "--out", tmp_path / "x.png"), "tokenizer/ is missing")


def test_what_no_row_could_be_sampled_by_is_refused_first(
    fewstep: Command, trained: Path, teacher: Path, tmp_path: Path
):
    out = ("--steps", "2", "--prompts", "embedded:emoji", "--out", tmp_path / "report.json")
    refused(fewstep("evaluate", trained, teacher, "--scheduler", "dpm", *out), "scheduler 'dpm' is unknown")
    assert not any(tmp_path.iterdir())
    for times in ("999,5000", "100,999", "999,999"):
        answer = fewstep(
            "sample", teacher, "-p", "a", "--scheduler", "lcm", "--timesteps", times, "--out", tmp_path / "x.png"
        )
        refused(answer, f"timesteps {times}: must fall, from at most 999")
    (tmp_path / "file").write_text("")
    answer = fewstep("sample", teacher, "-p", "a", "-n", 1, "--steps", 1, "--out", tmp_path / "file" / "x.png")
    refused(answer, "x.png: cannot be written")


def test_a_warm_up_of_the_whole_run_is_said(fewstep: Command, config: Path, tmp_path: Path):
    """The student is saved as it started."""
    keys = ("fake_score_warmup_steps=2", "report_num=null", f"output_dir={tmp_path}")
    answer = fewstep("train", config, *keys)
    assert answer.code == 0
    assert "fake_score_warmup_steps 2: the student learns nothing in 2 iterations" in answer.out + answer.err


def test_the_module_is_the_same_command(
    fewstep: Command, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from fewstep.distill.__main__ import main

    for arguments in (["rank=4", "--dry-run"], ["rank=many"]):
        monkeypatch.setattr(sys, "argv", ["fewstep.distill", str(config), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert Answer(int(end.value.code or 0), *capsys.readouterr()) == fewstep("train", config, *arguments)


def test_the_module_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from fewstep.distill.__main__ import main

    monkeypatch.setattr(sys, "argv", ["fewstep.distill"])
    with pytest.raises(SystemExit) as end:
        main()
    refused(Answer(int(end.value.code or 0), *capsys.readouterr()), "CONFIG", "--help")


def test_a_finished_run_prints_its_table_and_where_things_are(trained: Path, config: Path):
    printed = (config.parent / "printed.txt").read_text()
    assert printed.startswith((trained / "report.md").read_text())
    for what in (trained / "samples" / "report.png", trained / "student"):
        assert what.exists()
        assert f"  {what}\n" in printed


def test_a_teacher_without_prompts_trains_and_reports(fewstep: Command, config: Path, tmp_path: Path):
    """An unconditional pipeline: the basic figures, and no guidance."""
    tiny_ddpm(tmp_path / "ddpm")
    (tmp_path / "prompts.txt").write_text("nothing\n")
    answer = fewstep(
        *("train", config, f"teacher={tmp_path / 'ddpm'}", f"output_dir={tmp_path}", "height=null", "width=null"),
        *(f"prompts={tmp_path / 'prompts.txt'}", "report_prompts=null", "guidance_scale=1", "steps=[2]"),
    )
    assert (answer.code, answer.out.count("pixel_distance")) == (0, 1)
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert [(r["role"], r["steps"], r["nfe"]) for r in report["rows"]] == [
        ("teacher", 8, 8),
        ("teacher", 1, 1),
        ("student", 2, 2),
    ]
    assert torch.tensor([r["metrics"]["pixel_distance"]["value"] for r in report["rows"]]).gt(0).all()
