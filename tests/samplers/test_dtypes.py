"""Types of weights: float32 whatever the files hold, lower where that is asked for; few rows in a decoder at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.distill.efficiency import unquantised
from fewstep.distill.evaluation import Teacher
from fewstep.samplers import baseline
from fewstep.samplers.baseline import stock_images
from fewstep.samplers.denoisers import base
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import denoiser_of, dtypes, family, load, load_pipeline
from fewstep.samplers.manifest import fingerprint, same_weights
from fewstep.samplers.plan import sample, uniform_plan
from tests.pipelines import tiny_stable_diffusion, tiny_wan
from tests.samplers.test_load import BUILDERS

PROMPTS = ["a cat", "a red apple"]
WITHOUT_TEXT = ("ConsistencyModelPipeline", "DDPMPipeline", "DiTPipeline")
SIZE: dict[str, dict[str, int]] = {
    "FluxPipeline": {"height": 64, "width": 64},
    "SanaPipeline": {"height": 64, "width": 64},
    "WanPipeline": {"height": 64, "width": 64, "num_frames": 5},
}


@pytest.fixture(scope="module", params=[name for name in BUILDERS if name not in WITHOUT_TEXT])
def halved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A pipeline whose text encoders were saved in half precision, as SDXL's, SD 3's and FLUX's are on the hub."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = BUILDERS[request.param](folder)
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder") and component is not None:
            component.half().save_pretrained(folder / name)
    return request.param, folder


def types(pipeline: Any) -> dict[str, set[torch.dtype]]:
    modules = {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}
    return {k: {p.dtype for p in m.parameters()} for k, m in modules.items()}


def test_files_in_half_precision_load_in_float32(halved: tuple[str, Path]):
    """transformers would keep its encoders' type, which their networks refuse; the stock call and ours run."""
    name, folder = halved
    denoiser = load(folder)
    assert set.union(*types(denoiser.pipeline).values()) == {torch.float32}
    assert stock_images(denoiser.pipeline, PROMPTS[:1], [0], 1, **SIZE.get(name, {})).isfinite().all()
    shape = denoiser.latent_shape(*(SIZE.get(name, {}).get(k) for k in ("height", "width", "num_frames")))
    with torch.no_grad():
        condition = denoiser.encode(PROMPTS[:1])
        assert sample(denoiser, condition, uniform_plan(1), [0], shape).isfinite().all()


def test_lower_precision_draws_the_same(halved: tuple[str, Path]):
    """Networks and encoders in bfloat16 beside an autoencoder in float32: the stock call's images, and ours, move little."""
    name, folder = halved
    size = SIZE.get(name, {})
    exact, low = load(folder), load(folder, **dtypes("bf16"))
    kept = {torch.float32} if "Wan" in name else set()  # what diffusers keeps of its transformer
    for component, found in types(low.pipeline).items():
        assert found - kept == ({torch.float32} - kept if component == "vae" else {torch.bfloat16}), component
    one, other = (stock_images(d.pipeline, PROMPTS, [0, 1], 2, **size) for d in (exact, low))
    assert (one - other).abs().mean() < 0.02
    shape = exact.latent_shape(*(size.get(k) for k in ("height", "width", "num_frames")))
    drawn = []
    for denoiser in (exact, low):
        with torch.no_grad():
            latents = sample(denoiser, denoiser.encode(PROMPTS), uniform_plan(2), [0, 1], shape)
        drawn.append(denoiser.decode(latents))
    assert (drawn[0] - drawn[1]).abs().mean() < 0.02
    assert (drawn[0] - drawn[0].flip(0)).abs().mean() > 0
    # from the files of its networks alone, in bfloat16
    asked: Any = SimpleNamespace(teacher=str(folder), revision=None, variant=None)  # what a config says of it
    again = unquantised(asked, family(name))
    assert [k for k, v in again.pipeline.components.items() if k.startswith(("text_encoder", "vae")) and v] == []
    assert same_weights(fingerprint(again), fingerprint(exact))


def test_an_unknown_type_is_one_line():
    with pytest.raises(UserError, match=r"^dtype half: unknown; allowed: fp32, bf16, fp16$"):
        dtypes("half")


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_wan], ids=["images", "clips"])
def test_a_decoder_sees_few_rows_at_once(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch):
    """As many as have the pixels of one large image, in the stock call and in ours; the images stay what they were."""
    pipeline = build()
    size = {"height": 64, "width": 64, "num_frames": 5} if "Wan" in type(pipeline).__name__ else {}
    denoiser = denoiser_of(pipeline)
    shape = denoiser.latent_shape(*(size.get(k) for k in ("height", "width", "num_frames")))
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    whole = denoiser.decode(latents), stock_images(pipeline, PROMPTS, [0, 1], 1, **size)
    rows: list[int] = []
    decode = type(pipeline.vae).decode

    def noting(self: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(z))
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.vae), "decode", noting)
    pixels = whole[0][0].numel() // 3
    monkeypatch.setattr(base, "PIXELS", 2 * pixels)
    parts = denoiser.decode(latents), stock_images(pipeline, PROMPTS, [0, 1], 1, **size)
    monkeypatch.setattr(base, "PIXELS", pixels - 1)
    torch.testing.assert_close(stock_images(pipeline, PROMPTS, [0, 1], 1, **size), whole[1], atol=1e-4, rtol=0)
    # Wan's frames in latents are more than its frames, by a share: one clip at a time in both
    assert rows == ([1] * 7 if denoiser.clips else [2, 1, 2, 1, 1])
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)
    assert "decode" not in vars(pipeline.vae)


def test_rows_at_once_are_of_an_images_pixels():
    """Of 256x256 sixteen: DiT's pipeline does not say how its decoder enlarges; a model of pixels has none."""
    from tests.pipelines import tiny_ddpm, tiny_dit

    dit, pixels = tiny_dit(), tiny_ddpm()
    factor = 2 ** (len(dit.vae.config.block_out_channels) - 1)
    assert factor > 1
    assert base.rows_at_once(dit, torch.zeros(1, 4, 256 // factor, 256 // factor)) == 16
    assert base.rows_at_once(pixels, torch.zeros(1, 3, 256, 256)) == 16
    assert base.rows_at_once(tiny_wan(), torch.zeros(1, 16, 21, 60, 104)) == 1


def test_ddim_clips_only_where_the_pipeline_does():
    """PixArt's scheduler has no such key, and DDIM's default would clip its latents to -1 and 1."""
    import diffusers

    own = diffusers.DPMSolverMultistepScheduler(beta_end=0.02)
    assert "clip_sample" not in own.config
    assert baseline.scheduler_of(own, "ddim").config.clip_sample is False
    pixels = diffusers.DDPMScheduler()
    assert baseline.scheduler_of(pixels, "ddim").config.clip_sample is True


def test_fresh_noise_of_a_scheduler_is_asked_for(tmp_path: Path):
    """eta of TCD and DDIM: none by default, as the pipeline's call has it; named in the row; refused where there is none."""
    tiny_stable_diffusion(tmp_path)
    teacher = Teacher(str(tmp_path))
    for name in ("ddim", "tcd"):
        plain, noisy, zero = (teacher.sampler(4, 1.0, name, eta=eta) for eta in (None, 0.3, 0.0))
        assert noisy.scheduler.endswith("eta 0.3)")
        images = [s.images(PROMPTS, [3, 5]) for s in (plain, noisy, zero)]
        assert torch.equal(images[0], images[2])
        assert (images[0] - images[1]).abs().max() > 1e-3
        pipeline = load_pipeline(tmp_path)
        pipeline.scheduler = baseline.scheduler_of(pipeline.scheduler, name, "trailing" if name == "ddim" else None)
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", "eta": 0.3}
        theirs = pipeline(PROMPTS, generator=[torch.Generator().manual_seed(s) for s in (3, 5)], **call).images
        torch.testing.assert_close(images[1], theirs, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"^eta: DPMSolverMultistepScheduler has none; scheduler ddim or tcd does$"):
        teacher.sampler(4, eta=0.3)
    with pytest.raises(UserError, match=r"^eta 2: must be from 0 to 1$"):
        teacher.sampler(4, scheduler="tcd", eta=2)
