"""Teacher baselines: named stock schedulers on a pipeline's own levels, one generator per image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.samplers.baseline import OF_STUDENTS, SCHEDULERS, counted, default_scheduler, scheduler_of, stock_images
from fewstep.samplers.errors import UserError
from tests.pipelines import (
    tiny_classes,
    tiny_ddpm,
    tiny_dit,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.pipelines_large import tiny_stable_diffusion_xl

PROMPTS = ["a cat", "a red apple"]


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_stable_diffusion(prediction_type="v_prediction", zero_terminal_snr=True)


@pytest.fixture(scope="module")
def sd3() -> Any:
    return tiny_stable_diffusion_3()


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in OF_STUDENTS])
@pytest.mark.parametrize(
    ("spacing", "times"),
    [("trailing", [999, 749, 499, 249]), ("leading", [750, 500, 250, 0]), ("linspace", [999, 666, 333, 0])],
)
def test_a_named_scheduler_keeps_the_levels_and_takes_the_spacing(sd: Any, name: str, spacing: str, times: list[int]):
    """DPM-Solver++, UniPC and their kind leave out the last point of linspace and leading, which is clean."""
    scheduler = scheduler_of(sd.scheduler, name, spacing)
    scheduler.set_timesteps(4)
    multistep = name in ("dpmsolver++", "unipc")
    if multistep and spacing == "linspace":
        times = [999, 749, 500, 250]
    if multistep and spacing == "leading":
        times = [800, 600, 400, 200]
    assert scheduler.timesteps.tolist() == pytest.approx(times, abs=1)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    alphas = scheduler.alphas_cumprod[:-1]  # the last is 0, or nearly so where a solver divides by it
    torch.testing.assert_close(alphas, sd.scheduler.alphas_cumprod[:-1])


def test_flows(sd3: Any):
    """Euler is the pipeline's own; multistep solvers get its shift; DDIM and spacings mean nothing."""
    own = sd3.scheduler
    euler = scheduler_of(own, "euler", "leading")
    assert type(euler) is type(own)
    assert euler.config.shift == own.config.shift == 3
    solver = scheduler_of(own, "dpmsolver++")
    for scheduler in (solver, own):
        scheduler.set_timesteps(8)
    # both start at pure noise, and pass the same shift: u = 1/2 goes to 3/4
    assert solver.config.flow_shift == 3
    assert solver.sigmas[0].item() == pytest.approx(1, abs=2e-3)
    assert solver.sigmas[4].item() == pytest.approx(0.75, abs=5e-3)
    with pytest.raises(UserError, match="scheduler ddim: cannot run on the levels of a flow; allowed: own"):
        scheduler_of(own, "ddim")


def test_euler_keeps_the_shift_of_a_flow_that_calls_it_otherwise():
    """Wan's UniPC and Sana's DPM-Solver++ say flow_shift."""
    own = tiny_wan(flow_shift=5.0).scheduler
    euler = scheduler_of(own, "euler")
    euler.set_timesteps(4)
    u = torch.linspace(1, 0.001, 4)  # diffusers' own levels, from the first to the last of its table
    assert euler.config.shift == 5
    torch.testing.assert_close(euler.sigmas[0].item(), 1.0)
    assert euler.sigmas[1].item() == pytest.approx((5 * u[1] / (1 + 4 * u[1])).item(), abs=0.02)


def test_defaults(sd: Any, sd3: Any):
    assert [default_scheduler(p.scheduler) for p in (sd, sd3, tiny_ddpm())] == ["dpmsolver++", "own", "ddim"]


def test_unknown_names_list_the_known(sd: Any):
    with pytest.raises(UserError, match=r"scheduler 'dpm' is unknown; allowed: own, ddim, dpmsolver\+\+"):
        scheduler_of(sd.scheduler, "dpm")
    with pytest.raises(UserError, match="spacing 'log' is unknown; allowed: trailing, leading, linspace"):
        scheduler_of(sd.scheduler, "ddim", "log")


def test_an_image_depends_on_its_own_seed(sd: Any):
    """Not on its place nor on its neighbours; batches of networks differ by rounding."""
    together = stock_images(sd, PROMPTS, [5, 6], 3, 2.0)
    alone = stock_images(sd, PROMPTS[1:], [6], 3, 2.0)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)
    assert (stock_images(sd, PROMPTS[1:], [7], 3, 2.0) - alone).abs().mean() > 0.01


def test_size_and_negative_prompt_reach_the_pipeline(sd: Any):
    small, large = (stock_images(sd, ["a cat"], [0], 2, 3.0, height=h, width=16) for h in (16, 32))
    assert (small.shape, large.shape) == ((1, 3, 16, 16), (1, 3, 32, 16))
    # one side alone: Stable Diffusion's call would leave it out
    assert stock_images(sd, ["a cat"], [0], 2, 3.0, height=32).shape == (1, 3, 32, 16)
    assert stock_images(sd, ["a cat"], [0], 2, 3.0, width=32).shape == (1, 3, 16, 32)
    other = stock_images(sd, ["a cat"], [0], 2, 3.0, "a dog")
    assert (other - small).abs().mean() > 1e-3
    with pytest.raises(UserError, match="StableDiffusionPipeline takes no num_frames"):
        stock_images(sd, ["a cat"], [0], 2, num_frames=5)


def test_no_negative_prompt_is_the_pipelines_own():
    """SDXL's is zeros; the embedding of "" gives another image."""
    pipe = tiny_stable_diffusion_xl()
    call = {"num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "pt"}
    own, of_empty = (
        pipe("a cat", **call, **extra, generator=[torch.Generator().manual_seed(0)]).images
        for extra in ({}, {"negative_prompt": ""})
    )
    ours = stock_images(pipe, ["a cat"], [0], 2, 6.0)
    torch.testing.assert_close(ours, own)
    assert (ours - of_empty).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ["own", "dpmsolver++", "ddim", "lcm"])
def test_one_step_of_pixart_alpha(name: str):
    """Its call asks a scheduler for a second entry then, which most have not."""
    pipe = tiny_pixart()
    pipe.scheduler = scheduler_of(pipe.scheduler, name)
    assert stock_images(pipe, ["a cat"], [0], 1, 3.0, height=16, width=16).isfinite().all()
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize(("guidance", "nfe"), [(1.0, 3), (3.0, 6)])
def test_counted_is_the_nfe(sd: Any, guidance: float, nfe: int):
    with counted([sd.unet]) as rows:
        stock_images(sd, PROMPTS, [0, 1], 3, guidance)
    assert sum(rows) / len(PROMPTS) == nfe
    stock_images(sd, PROMPTS, [0, 1], 1)
    assert sum(rows) / len(PROMPTS) == nfe  # no longer counted


def test_counted_sees_a_transformer(sd3: Any):
    with counted([sd3.transformer]) as rows:
        stock_images(sd3, PROMPTS, [0, 1], 2, 3.0)
    assert rows == [4, 4]


def test_an_unconditional_pipeline():
    """Its own numpy pictures, channels first."""
    pipe = tiny_ddpm()
    pipe.scheduler = scheduler_of(pipe.scheduler, "ddim", "trailing")
    images = stock_images(pipe, ["", ""], [3, 4], 4)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    want = pipe(2, generators, num_inference_steps=4, output_type="np").images
    assert torch.equal(images, torch.from_numpy(want).permute(0, 3, 1, 2))


def test_an_unconditional_pipeline_does_not_scale_as_euler_needs():
    pipe = tiny_ddpm(clip_sample=False)
    pipe.scheduler = scheduler_of(pipe.scheduler, "euler")
    with pytest.raises(UserError, match="EulerDiscreteScheduler: DDPMPipeline does not scale its noise or inputs"):
        stock_images(pipe, [""], [0], 4)


def test_labels_in_place_of_prompts():
    """Of DiT with its guidance, of pixels without; DiT does not scale its first noise as Euler needs, nor takes a prompt."""
    dit, classes = tiny_dit(), tiny_classes()
    call = {"num_inference_steps": 3}
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    want = dit([207, 7], guidance_scale=3.0, generator=generators, **call, output_type="pt").images
    assert torch.equal(stock_images(dit, ["golden retriever", "7"], [3, 4], 3, 3.0), want)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    pixels = classes(2, [1, 4], generator=generators, **call, output_type="np").images
    assert torch.equal(stock_images(classes, ["1", "4"], [3, 4], 3, 3.0), torch.from_numpy(pixels).movedim(-1, -3))
    with pytest.raises(UserError, match="DiTPipeline takes no negative_prompt"):
        stock_images(dit, ["7"], [3], 3, 3.0, "goldfish")
    dit.scheduler = scheduler_of(dit.scheduler, "euler", "trailing")
    with pytest.raises(UserError, match="EulerDiscreteScheduler: DiTPipeline does not scale its first noise"):
        stock_images(dit, ["7"], [3], 3)


def test_pixart_draws_the_size_that_is_asked():
    """Without the bins of the pipeline, which know no size this small."""
    images = stock_images(tiny_pixart(), ["a cat", "a dog"], [0, 1], 2, 3.0, "blurry", height=16, width=24)
    assert images.shape == (2, 3, 16, 24)
