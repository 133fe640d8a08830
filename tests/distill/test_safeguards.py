"""What ends a run early: each is made to happen, and none speaks on a run that is well."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.distill import run, safeguards
from fewstep.distill.objectives.divergence import spread
from fewstep.distill.run import train
from fewstep.distill.safeguards import check_unmoved, checksums, preflight
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, load
from fewstep.samplers.plan import sample
from tests.closed_form import vp
from tests.distill.runs import config, metrics
from tests.pipelines import tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan

PROMPTS = ["a cat", "a red apple"]
OWN, CLIP = (None, None, None), (64, 64, 5)


# preflight


@pytest.fixture(scope="module")
def sd() -> Denoiser:
    return denoiser_of(tiny_stable_diffusion())


@pytest.mark.parametrize(
    ("build", "scale", "size"),
    [
        (lambda: tiny_stable_diffusion(prediction_type="v_prediction", zero_terminal_snr=True), 3.0, OWN),
        (lambda: tiny_stable_diffusion(guidance_input=True), 3.0, OWN),
        (lambda: tiny_stable_diffusion_3(dynamic_shift=True), 3.0, (32, 16, None)),
        (lambda: tiny_wan(two_transformers=True), 3.0, CLIP),
        (tiny_ddpm, 1.0, OWN),
    ],
    ids=["v", "guidance input", "flow", "clips", "pixels"],
)
def test_a_teacher_that_is_sampled_well(
    build: Callable[[], Any], scale: float, size: tuple, compared: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """The stock pipeline is asked, and agrees; the pipeline's scheduler stays; the same spread as of the latents drawn."""
    monkeypatch.setattr(safeguards, "CONSTANT", 0.0)  # random decoders
    drawn = []
    monkeypatch.setattr(safeguards, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    teacher = denoiser_of(build())
    own = teacher.pipeline.scheduler
    teacher = teacher.at(teacher.latent_shape(*size))
    said: list[str] = []
    found = preflight(teacher, PROMPTS, "blurry", scale, size, said.append)
    assert (len(compared), said) == (1, [])
    assert teacher.pipeline.scheduler is own
    assert found == (None if size == CLIP else float(spread(drawn[0])))


def wrong_guidance(teacher: Denoiser) -> None:
    guided = teacher.guided_x0
    teacher.guided_x0 = lambda x, t, c, scale, told=None: guided(x, t, c, 1.0, told)  # type: ignore[method-assign]


def wrong_text(teacher: Denoiser) -> None:
    encode = teacher.encode
    teacher.encode = lambda prompts, negative="": encode(["another"] * len(prompts), negative)  # type: ignore[method-assign]


def wrong_type(teacher: Denoiser) -> None:
    teacher.noise = vp("v_prediction")


def wrong_scale(teacher: Denoiser) -> None:
    decode = teacher.to_images
    teacher.to_images = lambda latents: decode(latents / 2)  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", [wrong_guidance, wrong_text, wrong_type, wrong_scale])
def test_a_teacher_that_fewstep_calls_wrongly(spoil: Callable[[Denoiser], None]):
    teacher = denoiser_of(tiny_stable_diffusion())
    spoil(teacher)
    with pytest.raises(
        UserError, match=r"differ from those of the stock StableDiffusionPipeline, by 0\.\d+ of the range"
    ):
        preflight(teacher, PROMPTS, "", 7.5)


def test_rounding_of_low_precision_is_no_fault_and_hides_none(monkeypatch: Any):
    """In bfloat16 the stock call's own rounding is allowed for, whatever the bound; a wrong call stands out all the same."""
    teacher = load("embedded:emoji", torch_dtype=torch.bfloat16)
    prompts = ["a furry animal on a blue background", "a fruit on a pink background"]
    monkeypatch.setattr(safeguards, "DIFFERENCE", 1e-5)
    preflight(teacher, prompts, "", 2.0)
    wrong_guidance(teacher)
    with pytest.raises(UserError, match="differ from those of the stock"):
        preflight(teacher, prompts, "", 2.0)


def test_a_teacher_of_one_colour():
    """Its autoencoder answers grey whatever it is given, as one in the wrong precision or with lost weights does."""
    teacher = denoiser_of(tiny_stable_diffusion())
    last = teacher.pipeline.vae.decoder.conv_out
    last.weight.data.zero_()
    with pytest.raises(UserError, match=r"are of one colour \(pixels vary by 0 of the range\): look at its weights"):
        preflight(teacher, PROMPTS, "", 3.0)
    last.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="are not finite"):
        preflight(teacher, PROMPTS, "", 3.0)


def test_a_run_stops_before_its_first_step(tmp_path: Path):
    """In one line, with nothing cached and nothing trained; the key lets it train all the same."""
    settings = {"method": "dmd2", "train_data": None, "prompts": str(tmp_path / "prompts.txt"), "max_train_steps": 1}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    teacher = denoiser_of(tiny_stable_diffusion())
    wrong_scale(teacher)
    with pytest.raises(UserError, match="differ from those of the stock"):
        train(config(tmp_path, **settings), teacher=teacher)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert len(metrics(train(config(tmp_path, preflight=False, **settings), teacher=teacher))) == 1


def test_the_embedded_teacher_is_well():
    """And more varied over the pixels than an image of one colour by far."""
    teacher = load("embedded:emoji")
    found = preflight(teacher, ["a furry animal on a blue background", "a fruit on a pink background"], "", 2.0)
    assert found is not None
    assert found > 0.2


# the teacher's weights


def test_a_teacher_that_moves_is_told(sd: Denoiser):
    """By one bit of one weight; adapters and other precisions of the code do not count."""
    before = checksums(sd)
    assert checksums(sd) == before
    check_unmoved(before, sd)
    bits = sd.network.conv_in.weight.data.view(torch.int32)
    bits[0, 0, 0, 0] ^= 1
    with pytest.raises(
        UserError, match=rf"1 of its {len(before)} weights changed during training, e.g. unet.conv_in.weight"
    ):
        check_unmoved(before, sd)
    bits[0, 0, 0, 0] ^= 1
    check_unmoved(before, sd)


def test_exchanged_weights_are_another_teacher():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    network = torch.nn.Module()
    network.weight = weight
    teacher: Any = SimpleNamespace(networks={"unet": network})
    before = checksums(teacher)
    weight.data = weight.data[[1, 0, 2]]
    assert checksums(teacher) != before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_whose_teacher_moves_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    """Training itself never moves it: with adapters on it and beside copies the run ends well."""
    settings = {"method": "dmd2", "train_data": None, "prompts": str(tmp_path / "prompts.txt"), "student": kind}
    settings |= {"max_train_steps": 2, "train_batch_size": 2, "steps": [1]}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert (train(config(tmp_path, **settings), teacher=denoiser_of(tiny_stable_diffusion())) / "student").is_dir()
    teacher = denoiser_of(tiny_stable_diffusion())
    trained = run.Trainer.run

    def moving(self: Any) -> None:
        trained(self)
        next(p for k, p in teacher.network.named_parameters() if ".lora_" not in k).data += 1e-3

    monkeypatch.setattr(run.Trainer, "run", moving)
    with pytest.raises(UserError, match="changed during training"):
        train(config(tmp_path, **settings, name="moved"), teacher=teacher)
    assert (tmp_path / "moved/checkpoints/step-000002").is_dir()
    monkeypatch.undo()
    with pytest.raises(UserError, match="moved: its teacher's weights changed while it trained; name=OTHER"):
        train(config(tmp_path, **settings, name="moved"), resume=True, teacher=denoiser_of(tiny_stable_diffusion()))
    assert not (tmp_path / "moved/student").exists()


def test_a_run_that_is_stopped_has_looked_at_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"method": "dmd2", "train_data": None, "prompts": str(tmp_path / "prompts.txt"), "max_train_steps": 4}
    settings |= {"train_batch_size": 2, "steps": [1]}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    teacher = denoiser_of(tiny_stable_diffusion())
    after = run.Trainer._after

    def moved_and_stopped(self: Any) -> bool:
        next(p for k, p in teacher.network.named_parameters() if ".lora_" not in k).data += 1e-3
        os.kill(os.getpid(), signal.SIGTERM)
        return after(self)

    monkeypatch.setattr(run.Trainer, "_after", moved_and_stopped)
    with pytest.raises(UserError, match="changed during training"):
        train(config(tmp_path, **settings), teacher=teacher)
    assert json.loads((tmp_path / "run/environment.json").read_text())["moved"]


def test_a_run_goes_on_with_the_weights_it_began_with(tmp_path: Path):
    """Another checkpoint at the same path, or on the same branch of a hub, is another teacher."""
    settings = {"method": "dmd2", "train_data": None, "prompts": str(tmp_path / "prompts.txt"), "max_train_steps": 1}
    settings |= {"train_batch_size": 2, "steps": [1]}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    train(config(tmp_path, **settings), teacher=denoiser_of(tiny_stable_diffusion()))
    longer = config(tmp_path, **settings | {"max_train_steps": 2})
    other = denoiser_of(tiny_stable_diffusion())
    for parameter in other.network.parameters():
        parameter.data *= 1.02
    with pytest.raises(UserError, match="run: cannot be resumed with other weights of its teacher than it began with"):
        train(longer, resume=True, teacher=other)
    train(longer, resume=True, teacher=denoiser_of(tiny_stable_diffusion()))
