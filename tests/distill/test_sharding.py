"""Two processes with shards of every role do what one does with whole weights, and leave what one leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from fewstep.distill import sharding
from fewstep.distill.config import ConfigError
from fewstep.distill.run import train
from fewstep.samplers.load import denoiser_of, load_student
from tests.distill.runs import assert_one, config, halved, write_images
from tests.distill.sharded_processes import RUNS, looked_at, settings
from tests.pipelines import tiny_stable_diffusion

ENV = os.environ | {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # test_processes.py has torchrun
JOB = {"method": "swiftbrush", "name": "job", "sharding_strategy": "full_shard", "rank": 2, "preflight": False}
JOB |= {
    "student": "full",
    "fake_score": "lora",
    "max_train_steps": 2,
    "train_batch_size": 2,
    "report_num": 2,
    "report_teacher_steps": [1],
}
every_run = pytest.mark.parametrize("name", RUNS)


def launched(root: Path, *words: str) -> str:
    """What a program of several processes says; it must end well."""
    done = subprocess.run([sys.executable, *words], cwd=root, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder of the runs, and what each of two processes found.

    one, two: straight, on so many processes; there: the first half on one, the rest on two; back: the other way round.
    job: the whole job by the command, whose teacher is a folder.
    """
    folder = tmp_path_factory.mktemp("shards") / "runs"
    write_images(folder / "images", 10)
    with pytest.MonkeyPatch.context() as patch:
        looked_at(patch)
        yield _runs(folder, root)


def _runs(folder: Path, root: Path) -> tuple[Path, list[dict[str, Any]]]:
    for name in RUNS:
        train(settings(folder, "one", name, 1), teacher=denoiser_of(tiny_stable_diffusion()))
        halved(folder / "one" / name, folder / "there" / name)
    tiny_stable_diffusion(folder / "teacher")
    own = {"teacher": "teacher", "train_data": "images", "cache_dir": "cache-job", "output_dir": "."}
    job = JOB | {k: str(folder / v) for k, v in own.items()}
    (folder / "job.yaml").write_text("".join(f"{k}: {v}\n" for k, v in job.items()))
    launched(root, *LAUNCH, "-m", "tests.distill.sharded_processes", str(folder))
    for name in RUNS:
        halved(folder / "two" / name, folder / "back" / name)
        train(settings(folder, "back", name, 1), resume=True, teacher=denoiser_of(tiny_stable_diffusion()))
    return folder, [json.loads(Path(f"{folder}-{rank}.json").read_text()) for rank in range(2)]


def test_every_weight_is_in_parts(runs: tuple[Path, list[dict[str, Any]]]):
    """Of frozen roles and of modules too; the two parts make up the whole, and neither is nearly all of it.

    dmd2: two adapters and the heads; lcm: student and average, as many again. Each run is sharded twice, new and resumed.
    """
    found = runs[1]
    assert [f["world"] for f in found] == [2, 2]
    for first, second in zip(*(f["held"] for f in found), strict=True):
        assert first["kinds"] == second["kinds"] == ["DTensor"]
        assert first["share"] + second["share"] == pytest.approx(1)
        assert first["share"] < 0.6  # of an odd number of rows the first has one more
        assert first["trained"] > 0
        assert first["whole"][0] > 0 == first["whole"][-1]  # nobody holds what was moved to the device whole
    assert [h["modules"] for h in found[0]["held"]] == [["discriminator"], []] * 2


@every_run
@pytest.mark.parametrize("where", ["two", "there", "back"])
def test_shards_are_one(runs: tuple[Path, list[dict[str, Any]]], where: str, name: str):
    """Straight on two processes, from one to two, from two to one."""
    assert_one(runs[0] / "one" / name, runs[0] / where / name)


def content(folder: Path) -> tuple[dict[str, bytes], dict[str, dict[str, torch.Tensor]]]:
    """An artifact's JSON files but those that depend on the time or on a folder, and its weights."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    texts = {k: p.read_bytes() for k, p in files.items() if p.suffix == ".json"}
    return texts, {k: load_file(p) for k, p in files.items() if p.suffix == ".safetensors"}


@every_run
def test_the_student_is_exported_whole(runs: tuple[Path, list[dict[str, Any]]], name: str):
    """The moving average, as from one process: same files, same classes in them, same weights; and it loads."""
    folder, _ = runs
    (texts, weights), (of_two, others) = (content(folder / which / name / "student") for which in ("one", "two"))
    assert texts == of_two
    assert weights.keys() == others.keys()
    for file, tensors in weights.items():
        assert tensors.keys() == others[file].keys()
        for key, value in tensors.items():
            torch.testing.assert_close(others[file][key], value, rtol=0, atol=1e-5)
    if name.endswith("full"):
        loaded, _ = load_student(folder / "two" / name / "student")
        assert type(loaded.network).__name__ == "UNet2DConditionModel"


@every_run
def test_previews_are_one(runs: tuple[Path, list[dict[str, Any]]], name: str):
    """Of the teacher and of the averaged student, in mid-training and at the end: to a rounding of 8 bits."""
    folder, _ = runs
    for file in ("step-000002.png", "step-000004.png"):
        one, two = (pil_to_tensor(Image.open(folder / n / name / "samples" / file)).int() for n in ("one", "two"))
        assert one.float().std() > 1
        assert (one - two).abs().max() <= 1


def test_forward_mode_goes_through_shards(runs: tuple[Path, list[dict[str, Any]]]):
    """The same operations on the same numbers: the gathered weights are those that were cut."""
    for found in runs[1]:
        assert max(found["derivative"]) < 1e-6


def test_two_networks_are_called_by_all_processes_or_by_none(runs: tuple[Path, list[dict[str, Any]]]):
    """Wan 2.2: each process has rows of a network that the other has not; nobody waits, and nothing is counted twice."""
    for found in runs[1]:
        assert found["sides"] < 1e-4


def test_all_stop_at_a_number_that_one_sees(runs: tuple[Path, list[dict[str, Any]]]):
    folder, found = runs
    kept = f"the last good checkpoint is {folder / 'bad/lcm-full/checkpoints/step-000002'}"
    line = f"iteration 3: the loss of student is not finite; {kept}. Try a lower learning_rate"
    assert [f["non-finite"] for f in found] == [line, line]


def test_accelerate_launch_runs_the_whole_job(runs: tuple[Path, list[dict[str, Any]]]):
    """As docs/many-devices.md has it: two processes, not one of each, with a report of the exported student.

    A full one beside a fake score that is a LoRA of the teacher.
    """
    folder, found = runs
    assert [f["job"] for f in found] == [0, 0]
    run = folder / "job"
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert {row["role"] for row in json.loads((run / "report.json").read_text())["rows"]} >= {"teacher", "student"}
    assert load_student(run)[1].kind == "full"
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line[f"{role}/grad_norm"] > 0 for line in log for role in ("student", "fake_score"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mixed_precision": "fp16"}, "fp16 and sharding_strategy full_shard do not go together; use bf16"),
        (
            {"train_text_encoder": True, "student": "full"},
            "train_text_encoder: not with sharding_strategy full_shard, a text encoder is not",
        ),
        ({}, "full_shard spreads weights over processes, and this is the only one; start several, e.g. torchrun"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, changes: dict[str, Any], line: str):
    """In one line, before anything is trained."""
    with pytest.raises(ConfigError, match=line) as error:
        train(
            config(tmp_path, train_data="embedded:emoji", sharding_strategy="full_shard", **changes),
            teacher=denoiser_of(tiny_stable_diffusion()),
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", ["no_shard", "full_shard"])
def test_plugins_of_the_launcher_are_refused(tmp_path: Path, strategy: str):
    """`accelerate launch --use_fsdp`: accelerate would stop later, at its own limit of one model."""
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2)
    with pytest.raises(ConfigError, match="FSDP of accelerate prepares one model alone"):
        sharding.refuse_launch(config(tmp_path, sharding_strategy=strategy), launched)  # type: ignore[arg-type]


def test_a_skeleton_holds_no_weights_and_is_filled():
    """Adapters and names are the network's; the network itself keeps its own."""
    from fewstep.distill.networks import Networks

    networks = Networks(denoiser_of(tiny_stable_diffusion()), "lora", rank=2)
    student = networks.trained("student").denoiser
    empty = sharding.skeleton(student)
    assert {p.device.type for p in empty["unet"].parameters()} == {"meta"}
    own = dict(student.networks["unet"].module.named_parameters())
    assert {p.device.type for p in own.values()} == {"cpu"}
    filled = sharding.gathered(student, empty, keep=True)
    got = dict(filled.networks["unet"].module.named_parameters())
    assert got.keys() == own.keys()
    assert all(got[k].equal(p) for k, p in own.items())
