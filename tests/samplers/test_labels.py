"""Class-conditional families: labels in place of prompts, and equal to their stock pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators, plan_of_scheduler, sample
from tests.pipelines import tiny_classes, tiny_ddpm, tiny_dit
from tests.samplers.families import family
from tests.samplers.test_denoisers import SEEDS, close

# the stock pipelines


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_dit(spacing: str, guidance_scale: float):
    """Which gives images alone. Its rows are conditional first; a negative label is not its null class."""
    pipe = tiny_dit()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
    denoiser = denoiser_of(pipe)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10, guidance_scale)
    call = {"num_inference_steps": 10, "guidance_scale": guidance_scale, "output_type": "pt"}
    theirs = pipe([1, 208], generator=generators(SEEDS), **call).images
    labels = ["goldfish", "Labrador retriever"]
    close(denoiser.decode(sample(denoiser, denoiser.encode(labels), plan, SEEDS)), theirs)
    if guidance_scale > 1:
        other = denoiser.decode(sample(denoiser, denoiser.encode(labels, "cock"), plan, SEEDS))
        assert (other - theirs).norm() > 0.01 * theirs.norm()


@pytest.mark.parametrize("classes", [5, None])
def test_unet2d_of_classes(classes: int | None):
    from diffusers import DDIMScheduler

    pipe = tiny_classes(classes=classes)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    denoiser = denoiser_of(pipe)
    assert denoiser.takes_prompts == (classes is not None)
    plan = plan_of_scheduler(pipe.scheduler, denoiser, 10)
    call = {"batch_size": 2, "class_labels": [3, 0] if classes else None, "num_inference_steps": 10}
    theirs = pipe(**call, generator=generators(SEEDS), output_type="pt").images
    close(denoiser.decode(sample(denoiser, denoiser.encode(["3", "0"]), plan, SEEDS)), theirs)


# labels


def test_a_class_conditional_unet_needs_a_pipeline_that_passes_labels_on():
    pipe = tiny_ddpm()
    pipe.unet.register_to_config(num_class_embeds=10)
    with pytest.raises(UserError, match=r"class-conditional, .* save it as ConsistencyModelPipeline\(unet, scheduler"):
        denoiser_of(pipe)
    pipe = tiny_classes()
    pipe.unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(UserError, match="class_embed_type timestep is not supported"):
        denoiser_of(pipe)


def test_a_consistency_model_is_no_teacher():
    """Its network, whose input and output the scheduler scales, gives the ends of trajectories."""
    from diffusers import CMStochasticIterativeScheduler

    pipe = tiny_classes()
    pipe.scheduler = CMStochasticIterativeScheduler()
    with pytest.raises(UserError, match="few steps already and is no teacher"):
        denoiser_of(pipe)


def test_labels_are_names_or_numbers():
    """Any of a class's names, in any case; "" is the null class, with which DiT guides."""
    dit = family("dit")
    condition = dit.encode(["Tinca tinca", "labrador Retriever", " 999", ""])
    assert condition.tensors["class_labels"].tolist() == [0, 208, 999, 1000]
    assert condition.negative["class_labels"].tolist() == [1000]
    assert dit.encode(["1"], "cock").negative["class_labels"].tolist() == [7]
    assert dit.examples == ("Tinca tinca", "goldfish")
    assert denoiser_of(tiny_dit(labels=False)).examples == ("0", "1")


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("dit", "golden retriver", "'golden retriver': no such class; did you mean golden retriever"),
        ("dit", "1000", r"label '1000': no such class; allowed: a number in 0\.\.999, or a name such as labrador"),
        ("dit", "-1", "label '-1': no such class"),
        ("unet2d_classes", "5", r"label '5': no such class; allowed: a number in 0\.\.4$"),
        ("unet2d_classes", "", "label '': no such class"),
    ],
)
def test_an_unknown_label_is_one_line(name: str, label: str, message: str):
    with pytest.raises(UserError, match=message) as raised:
        family(name).encode([label])
    assert "\n" not in str(raised.value)


def test_a_dit_of_other_classes_is_refused():
    """The stock pipeline's null class is 1000 whatever the network has."""
    pipe = tiny_dit()
    pipe.transformer.register_to_config(num_embeds_ada_norm=10)
    with pytest.raises(UserError, match="guides with class 1000, and this transformer has 10 classes"):
        denoiser_of(pipe)


def test_the_names_of_classes_are_saved_with_a_pipeline(tmp_path: Path):
    """As plain diffusers, which reads them from the published folder, does not by itself."""
    from diffusers import DiTPipeline

    tiny_dit(tmp_path / "published")
    pipe = DiTPipeline.from_pretrained(tmp_path / "published")
    denoiser_of(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert DiTPipeline.from_pretrained(tmp_path / "saved").labels == pipe.labels == family("dit").pipeline.labels
    assert pipe.labels["Tinca tinca"] == 0
