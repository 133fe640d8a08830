"""Students that do not start as their teacher: which weights are taken along, what is refused, and the way of a small one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill import run
from fewstep.distill.config import ConfigError
from fewstep.distill.memory import need
from fewstep.distill.planner import plan
from fewstep.distill.run import methods_distiller, networks_of
from fewstep.distill.student_start import origins, resized, said, spread, student_start
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, load, load_student
from fewstep.samplers.manifest import read_manifest
from fewstep.samplers.plan import sample
from tests.distill.runs import config, metrics, write_images
from tests.pipelines import (
    fill,
    tiny_classes,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.samplers.students import snippet_of

# which weights


def test_layers_are_spread_evenly():
    """First and last stay, none is taken twice, each is the nearest to its place; as many are themselves."""
    assert [spread(i, 28, 14) for i in range(14)] == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    for many in range(1, 12):
        assert [spread(i, many, many) for i in range(many)] == list(range(many))
        for few in range(2, many):
            taken = [spread(i, many, few) for i in range(few)]
            assert (taken[0], taken[-1], len(set(taken))) == (0, many - 1, few)
            assert all(abs(k - i * (many - 1) / (few - 1)) <= 0.5 for i, k in enumerate(taken))
    assert spread(0, 5, 1) == 0


def with_network(pipeline: Any, name: str, **changes: Any) -> Denoiser:
    """A tiny pipeline around a network of another config."""
    of = getattr(pipeline, name)
    network = type(of).from_config({**of.config, "_use_default_values": [], **changes})
    fill(network)
    pipeline.register_modules(**{name: network})
    return denoiser_of(pipeline)


def states(teacher: Denoiser, student: Denoiser) -> tuple[dict[str, Any], dict[str, Any]]:
    return teacher.network.state_dict(), student.network.state_dict()


def test_a_transformer_keeps_every_second_block(tmp_path: Path):
    """Five blocks become three: the first, the middle and the last; what is outside of them stays."""
    teacher = with_network(tiny_pixart(), "transformer", num_layers=5)
    student = resized(teacher, {"num_layers": 3})
    given, own = states(teacher, student)
    assert len(student.network.transformer_blocks) == 3
    for key, value in own.items():
        place = key.split(".")
        if place[0] == "transformer_blocks":
            place[1] = str(2 * int(place[1]))
        assert torch.equal(value, given[".".join(place)])
    line = said(config(tmp_path, student="full"), student, teacher)
    assert line.endswith("of the teacher's; they start as the teacher's where they fit, 100% of them")


def test_a_unet_of_fewer_layers_pairs_them():
    """Two layers a block become one: down the first, up the first and the last of three, whose skips are as wide."""
    teacher = with_network(tiny_stable_diffusion(), "unet", layers_per_block=2)
    student = resized(teacher, {"layers_per_block": 1})
    given, own = states(teacher, student)
    found = origins(given, own)
    assert found.keys() == own.keys()
    moved = {k.rsplit("resnets.", 1)[0] + "resnets." for k, v in found.items() if k != v and "resnets" in k}
    assert moved == {"up_blocks.0.resnets.", "up_blocks.1.resnets."}
    assert found["up_blocks.1.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"
    assert found["up_blocks.1.attentions.1.proj_in.weight"] == "up_blocks.1.attentions.2.proj_in.weight"
    assert found["up_blocks.1.resnets.0.conv1.weight"] == "up_blocks.1.resnets.0.conv1.weight"
    assert all(torch.equal(own[k], given[v]) for k, v in found.items())


def test_other_widths_start_at_random():
    """Where a shape differs; from the seed alone, and the caller's generator does not move."""
    teacher = denoiser_of(tiny_stable_diffusion())
    before = torch.get_rng_state()
    made = [resized(teacher, {"block_out_channels": [8, 24]}, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    given, own = states(teacher, made[0])
    found = origins(given, own)
    assert {k for k, v in own.items() if k in given and given[k].shape == v.shape} == found.keys()
    assert "conv_in.weight" in found
    assert "mid_block.resnets.0.conv1.weight" not in found
    again, other = (d.network.state_dict() for d in made[1:])
    assert all(torch.equal(v, again[k]) for k, v in own.items())
    assert not torch.equal(own["mid_block.resnets.0.conv1.weight"], other["mid_block.resnets.0.conv1.weight"])


def test_the_same_config_is_the_teacher():
    """To the bit, of two networks, too."""
    for teacher, changes in (
        (denoiser_of(tiny_stable_diffusion_3()), {"num_layers": 2}),
        (denoiser_of(tiny_wan(two_transformers=True)), {"num_layers": 2}),
    ):
        student = resized(teacher, changes)
        assert student.networks.keys() == teacher.networks.keys()
        for name, network in student.networks.items():
            given = teacher.networks[name].state_dict()
            assert all(torch.equal(v, given[k]) for k, v in network.state_dict().items())
            assert not {p.data_ptr() for p in network.parameters()} & {v.data_ptr() for v in given.values()}


# what is refused


@pytest.mark.parametrize(
    ("build", "changes", "line"),
    [
        (tiny_stable_diffusion, {"layer_per_block": 1}, "UNet2DConditionModel has no layer_per_block; did you mean"),
        (tiny_stable_diffusion, {"norm_num_groups": 5}, "student_config: no UNet2DConditionModel of it can be made"),
        (tiny_stable_diffusion, {"in_channels": 8}, r"unet is for latents \(8, 8, 8\), and the teacher's \(4, 8, 8\)"),
        (tiny_stable_diffusion, {"out_channels": 8}, r"unet makes \(8, 8, 8\) of latents \(4, 8, 8\)"),
        (tiny_stable_diffusion, {"cross_attention_dim": 8}, "unet cannot be called as the teacher's is"),
        (tiny_stable_diffusion, {"time_cond_proj_dim": 8}, "both it and the teacher's must take a guidance scale"),
        (tiny_classes, {"num_class_embeds": 3}, "unet has num_class_embeds 3, and the teacher's 5"),
    ],
)
def test_a_network_that_cannot_take_the_teachers_place(
    build: Callable[[], Any], changes: dict[str, Any], line: str, tmp_path: Path
):
    settings = config(tmp_path, student="full", student_config=changes)
    with pytest.raises(UserError, match=line) as caught:
        student_start(settings, denoiser_of(build()))
    assert "\n" not in str(caught.value)


def test_a_config_that_contradicts_itself(tmp_path: Path):
    small: dict[str, Any] = {"student_config": {"layers_per_block": 1}}
    for changes, line in (
        (
            {"method": "dmd2", **small},
            "config: student_config: needs student: full; a LoRA is one of the teacher's own",
        ),
        ({"method": "dmd2", "student_init": "x"}, "config: student_init: needs student: full"),
        (
            {"student_init": "x", **small},
            "config: student_init: has its own network; give student_config or student_init",
        ),
        ({"student_config": {}}, "config: student_config: .* at least 1 item"),
    ):
        with pytest.raises(ConfigError, match=line):
            config(tmp_path, **changes)
    lora = config(tmp_path, student="full", **small).model_copy(update={"student": "lora"})  # as the planner asks
    with pytest.raises(UserError, match="student_config: a LoRA is one of the teacher's own network"):
        networks_of(lora, denoiser_of(tiny_stable_diffusion()))


def test_a_start_that_is_no_student_of_the_teacher(tmp_path: Path):
    tiny_stable_diffusion(tmp_path / "v", prediction_type="v_prediction")
    tiny_pixart(tmp_path / "pixart")
    teacher = denoiser_of(tiny_stable_diffusion())
    for source, line in (
        ("pixart", "is a PixArtAlphaPipeline, and the teacher a StableDiffusionPipeline"),
        ("v", "predicts v_prediction, and the teacher epsilon"),
        ("nothing", "no such folder, and not a hub id"),
    ):
        with pytest.raises(UserError, match=line):
            student_start(config(tmp_path, student="full", student_init=str(tmp_path / source)), teacher)


# the way of a small student


SMALL = {"mid_block_type": None}
"""Drops the block in the middle, which is a third of the tiny UNet."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, pictures, prompts, and a run of TSM."""
    home = tmp_path_factory.mktemp("small")
    tiny_stable_diffusion(home / "base")
    write_images(home / "images", 4)
    (home / "prompts.txt").write_text("a red apple\na cat\nzebra\n0123456789\n")
    run.train(settings(home, method="tsm", train_data=str(home / "images"), name="tsm", student_config=SMALL))
    return home


def settings(home: Path, **changes: Any) -> Any:
    base = {
        **{"method": "dmd2", "student": "full", "teacher": str(home / "base"), "train_data": None, "preflight": False},
        **{"max_train_steps": 2, "train_batch_size": 2, "checkpointing_steps": 1, "learning_rate": 0.001},
    }
    if changes.get("method", "dmd2") == "dmd2":
        base |= {"prompts": str(home / "prompts.txt"), "steps": [1, 2], "fake_score_updates": 1}
        base |= {"student_init": str(home / "tsm")}
    return config(home, **(base | changes))


def test_tsm_leaves_a_pipeline_of_its_own(home: Path):
    """Whole, smaller, moved from its start, of many steps: what plain diffusers draws is what is drawn here."""
    from diffusers import DiffusionPipeline

    assert [key for key in metrics(home / "tsm")[0] if key.endswith("/loss")] == ["student/loss"]
    pipe: Any = DiffusionPipeline.from_pretrained(home / "tsm/student")
    assert pipe.unet.config.mid_block_type is None
    student, manifest = load_student(home / "tsm")
    assert (manifest.method, manifest.kind, manifest.base) == ("tsm", "full", str(home / "base"))
    start = resized(load(home / "base"), SMALL).network.state_dict()
    assert not torch.equal(student.network.state_dict()["conv_in.weight"], start["conv_in.weight"])
    x = sample(student, student.encode(["a cat"]), manifest.plan(50), [3])
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        "a cat",
        num_inference_steps=50,
        guidance_scale=1.0,
        output_type="latent",
        generator=[torch.Generator().manual_seed(3)],
    ).images
    assert torch.allclose(latents, x, atol=1e-4 * x.abs().max().item())


@pytest.fixture(scope="module")
def distilled(home: Path) -> Path:
    """A run of dmd2 from what TSM left."""
    return run.train(settings(home, name="dmd2"))


def test_the_student_is_small_and_the_fake_score_is_not(home: Path, distilled: Path):
    """In memory, and in the checkpoint that resume reads; it starts as what TSM left, bit for bit."""
    teacher = load(home / "base")
    made = networks_of(settings(home), teacher)
    roles = methods_distiller(settings(home), made).roles()
    tuned = load(home / "tsm").network.state_dict()
    assert all(torch.equal(p, tuned[k.removeprefix("unet.")]) for k, p in roles["student"].parameters.items())
    given = teacher.network.state_dict()
    assert all(torch.equal(p, given[k.removeprefix("unet.")]) for k, p in roles["fake_score"].parameters.items())
    sizes = {
        name: len(load_file(distilled / f"checkpoints/step-000002/{name}.safetensors"))
        for name in roles
        if roles[name].trained
    }
    assert sizes == {"student": len(tuned), "fake_score": len(given)}


def test_it_runs_in_plain_diffusers(distilled: Path, monkeypatch: pytest.MonkeyPatch):
    """By the lines of its card, to the picture that is drawn here."""
    monkeypatch.chdir(distilled / "student")
    names: dict[str, Any] = {}
    exec(snippet_of(distilled / "student", 2), names)
    assert names["pipe"].unet.config.mid_block_type is None
    student, manifest = load_student(distilled)
    x = sample(student, student.encode(names["prompts"]), manifest.plan(2), range(len(names["prompts"])))
    found = torch.from_numpy(np.array(names["image"])).permute(2, 0, 1)
    assert ((student.decode(x)[0] * 255).round() - found).abs().max() <= 1
    os.remove("image.png")


def test_resume_is_exact(home: Path, distilled: Path):
    """One iteration, then the other: the weights of a straight run, bit for bit."""
    one = settings(home, name="resumed", max_train_steps=1)
    run.train(one)
    run.train(one.model_copy(update={"max_train_steps": 2}), resume=True)
    found, wanted = (
        load_file(folder / "student/unet/diffusion_pytorch_model.safetensors")
        for folder in (home / "resumed", distilled)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_several_small_students(home: Path):
    """Each of them, and the whole draws with all."""
    folder = run.train(settings(home, name="several", parts=2, max_train_steps=1))
    denoiser, manifest = load_student(folder)
    assert denoiser.router is not None
    assert {network.config.mid_block_type for network in denoiser.networks.values()} == {None}
    prompts = (home / "prompts.txt").read_text().split("\n")[:4]
    x = sample(denoiser, denoiser.encode(prompts), manifest.plan(1), range(4))
    for i in range(2):
        alone, said = load_student(folder / f"student/student_{i}")
        rows = (denoiser.router.of(denoiser.encode(prompts)) == i).nonzero()[:, 0]
        own = sample(alone, alone.encode([prompts[k] for k in rows]), said.plan(1), rows.tolist())
        assert torch.allclose(x[rows], own, atol=1e-5)
    with pytest.raises(UserError, match="holds 2 students, and starts as many; set parts: 2"):
        networks_of(settings(home, student_init=str(folder)), load(home / "base"))


def test_a_moving_average_is_as_small(home: Path):
    """LCM's target is the student's, whatever the teacher's size; its guidance is an input of the small network."""
    changes = {"method": "lcm", "student_config": SMALL, "guidance_scale": 2.0, "guidance_scale_max": 4.0}
    folder = run.train(settings(home, name="lcm", train_data=str(home / "images"), **changes))
    unet = load_student(folder)[0].network
    assert (unet.config.mid_block_type, unet.config.time_cond_proj_dim) == (None, 256)
    assert read_manifest(folder / "student").plan(1).embedded_guidance == 3.0


def test_memory_is_that_of_both_sizes(home: Path):
    """The student's weights are fewer; the largest graph is the fake score's, a network as large as the teacher."""
    teacher = load(home / "base")
    small, same = (
        settings(home, student_init=None, student_config=changes) for changes in (SMALL, {"layers_per_block": 1})
    )
    needs = [
        need(c, methods_distiller(c, networks_of(c, teacher)), teacher, checkpointing=False) for c in (small, same)
    ]
    count = [sum(p.numel() for p in d.network.parameters()) for d in (resized(teacher, SMALL), teacher)]
    assert needs[1].weights - needs[0].weights == 4 * (count[1] - count[0])
    assert needs[0].activations == needs[1].activations
    alone = settings(home, method="tsm", student_config=SMALL)
    assert (
        need(alone, methods_distiller(alone, networks_of(alone, teacher)), teacher, False).activations
        < needs[0].activations
    )
    for planned in (small, settings(home)):  # a folder is read without its weights
        planner = plan(planned)
        assert re.search(rf"^student +- +{count[0]:,} +{count[0]:,}$", planner, re.MULTILINE)
        assert "LoRA on a shared base: student_" in planner
