"""Loading: what a user gets wrong is one line; what is right is the stock pipeline, safetensors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.samplers.errors import UserError
from fewstep.samplers.load import FAMILIES, class_of, denoiser_of, family, load, load_pipeline, resolve
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.hub import keep
from tests.pipelines import (
    PROMPTS,
    tiny_classes,
    tiny_ddpm,
    tiny_dit,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl

BUILDERS: dict[str, Callable[..., Any]] = {
    "ConsistencyModelPipeline": tiny_classes,
    "DDPMPipeline": tiny_ddpm,
    "DiTPipeline": tiny_dit,
    "PixArtAlphaPipeline": tiny_pixart,
    "PixArtSigmaPipeline": partial(tiny_pixart, sigma=True),
    "FluxPipeline": tiny_flux,
    "SanaPipeline": tiny_sana,
    "StableDiffusionPipeline": tiny_stable_diffusion,
    "StableDiffusion3Pipeline": tiny_stable_diffusion_3,
    "StableDiffusionXLPipeline": tiny_stable_diffusion_xl,
    "WanPipeline": tiny_wan,
}


def complaint(call: Callable[[], Any]) -> str:
    """The line that a user sees."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    tiny_ddpm(folder)
    return folder


@pytest.fixture
def broken(ddpm: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(ddpm, tmp_path / "copy"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_pipeline_loads_as_it_was(name: str, tmp_path: Path):
    """The same prediction from the folder as from the pipeline in memory; nothing requires a gradient."""
    memory = denoiser_of(BUILDERS[name](tmp_path))
    assert class_of(tmp_path) == name
    disk = load(tmp_path)
    assert type(disk) is family(name)
    small = {"height": 64, "width": 64}
    size = {"WanPipeline": {**small, "frames": 5}, "FluxPipeline": small, "SanaPipeline": small}.get(name, {})
    x = randn((2, *memory.latent_shape(**size)), generators([0, 1]))
    t = torch.tensor([0.9, 0.4])
    prompts = ["0", "1"] if memory.examples else PROMPTS
    torch.testing.assert_close(
        disk.predict(x, t, disk.encode(prompts)), memory.predict(x, t, memory.encode(prompts)), rtol=0, atol=1e-6
    )
    for module in disk.pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())


def test_wan_with_two_transformers_keeps_both(tmp_path: Path):
    tiny_wan(tmp_path, two_transformers=True, boundary_ratio=0.875)
    denoiser = load(tmp_path)
    assert list(denoiser.networks) == ["transformer", "transformer_2"]
    assert denoiser.pipeline.config.boundary_ratio == 0.875
    assert denoiser.noise.shift(torch.tensor(0.5)).item() == pytest.approx(0.75)  # UniPC's flow_shift 3, from the file


def test_the_builders_give_the_same_weights_every_time():
    """And leave the caller's random state alone."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = tiny_ddpm().unet, tiny_ddpm().unet
    assert torch.rand(1) == expected
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_missing_folder():
    line = complaint(lambda: load("/nowhere/at/all"))
    assert line == "/nowhere/at/all: no such folder, and not a hub id of the form ORG/NAME"


def test_folder_without_an_index(tmp_path: Path):
    assert "no model_index.json there; it must be a diffusers pipeline folder" in complaint(lambda: load(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '"text"', "\x00\xff"])
def test_an_index_that_is_none(text: str, tmp_path: Path):
    (tmp_path / "model_index.json").write_bytes(text.encode("latin-1"))
    line = complaint(lambda: load(tmp_path))
    assert "model_index.json: not a pipeline's index" in line


def test_an_unsupported_class_names_the_supported_ones(broken: Path):
    """Before any weight loads: there is none here."""
    index = broken / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "KandinskyPipeline"}))
    shutil.rmtree(broken / "unet")
    line = complaint(lambda: load(broken))
    assert line == f"pipeline class KandinskyPipeline is not supported; supported: {', '.join(sorted(FAMILIES))}"


def test_corrupt_weights(broken: Path):
    (weights,) = broken.glob("unet/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    line = complaint(lambda: load(broken))
    assert str(broken) in line
    assert "cannot be loaded as DDPMPipeline" in line


def test_missing_component(broken: Path):
    shutil.rmtree(broken / "unet")
    assert complaint(lambda: load(broken)).startswith(f"{broken}: unet/ is missing, which model_index.json names")
    (broken / "unet").mkdir()
    assert f"{broken}: cannot be loaded as DDPMPipeline" in complaint(lambda: load(broken))


def test_pickles_are_refused(broken: Path):
    """Weights that only a pickle holds: torch.load would run what is in it."""
    from safetensors.torch import load_file

    (weights,) = broken.glob("unet/*.safetensors")
    torch.save(load_file(weights), broken / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    assert "safetensors" in complaint(lambda: load(broken))


def test_an_unknown_embedded_teacher_lists_those_there_are():
    line = complaint(lambda: resolve("embedded:nothing"))
    assert line.startswith("embedded:nothing: no such embedded teacher; shipped:")


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch):
    """The tests run offline; the same line where the hub cannot be reached."""
    line = complaint(lambda: load("nobody/nothing"))
    assert line == "nobody/nothing: no such folder, not in the hub cache, and the hub cannot be reached"


def test_a_revision_and_a_variant_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each brings its own weights; a branch and its commit are one; what is not there is one line, with a folder's too."""
    main, old = tmp_path / "main", tmp_path / "old"
    own = {"main": tiny_ddpm(main).unet}
    for name, factor in (("fp16", 3.0), ("old", 2.0)):
        pipeline = tiny_ddpm()
        for p in pipeline.unet.parameters():
            p.mul_(factor)
        pipeline.save_pretrained(old if name == "old" else main, variant="fp16" if name == "fp16" else None)
        own[name] = pipeline.unet
    commits = keep(tmp_path / "cache", "org/tiny", {"main": main, "old": old}, monkeypatch)
    asked = {
        (None, None): "main",
        ("main", None): "main",
        ("old", None): "old",
        (commits["old"], None): "old",
        (None, "fp16"): "fp16",
    }
    for (revision, variant), want in asked.items():
        found = load("org/tiny", revision, variant).network.state_dict()
        assert all(torch.equal(found[k], v) for k, v in own[want].state_dict().items()), (revision, variant)
    assert torch.equal(load(main, variant="fp16").network.conv_in.weight, own["fp16"].conv_in.weight)
    where = "no such folder, not in the hub cache at revision none, and the hub cannot be reached"
    assert complaint(lambda: load("org/tiny", "none")) == f"org/tiny: {where}"
    for source in ("org/tiny", old):
        line = complaint(lambda s=source: load(s, "old" if s == "org/tiny" else None, "fp16"))
        assert line.startswith(f"{source}: cannot be loaded as DDPMPipeline")
        assert "fp16" in line
    assert complaint(lambda: load(old, "old")) == f"revision old: of a repository of the hub; {old} is a folder"


def test_a_gated_or_missing_repository(monkeypatch: pytest.MonkeyPatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    response = httpx.Response(401, request=httpx.Request("GET", "https://hub.invalid"))
    for error, expected in (
        (GatedRepoError, "org/name: gated; accept its licence on its page and log in"),
        (RepositoryNotFoundError, "org/name: no such folder, and no such repository on the hub (or it is private)"),
        (RevisionNotFoundError, "org/name: the hub has no revision v1 of it"),
        (HfHubHTTPError, "org/name: the hub answered: 401 first line"),
    ):

        def fail(*_: Any, error: type[HfHubHTTPError] = error, **__: Any) -> str:
            raise error("401 first line\nsecond line", response=response)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        assert complaint(lambda: load("org/name", "v1")).startswith(expected)


def test_weights_in_another_type_on_request(ddpm: Path):
    """`torch_dtype` is passed on; predictions stay float32."""
    denoiser = load(ddpm, torch_dtype=torch.bfloat16)
    assert denoiser.network.dtype == torch.bfloat16
    x = randn((1, 3, 8, 8), generators([0]))
    assert denoiser.predict(x, torch.tensor(0.5), denoiser.encode([""])).dtype == torch.float32
    assert load_pipeline(ddpm).unet.dtype == torch.float32
