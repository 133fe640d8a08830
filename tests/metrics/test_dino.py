"""DINOv2 features beside the plain use of transformers, with random weights from a folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.metrics.dino import Dino
from fewstep.metrics.frechet import frechet_distance
from tests.metrics.tiny_clip import noise_images

IMAGES = noise_images(5, height=70, width=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dino") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
        )
        for p in model.parameters():  # at their usual start the layers hardly change what they get
            torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(path)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dino(folder) -> Dino:
    return Dino(str(folder))


def test_features_are_those_of_transformers(dino, folder):
    """PIL images one by one through the processor, the normed class token of the model."""
    from transformers import AutoImageProcessor, Dinov2Model

    processor, model = AutoImageProcessor.from_pretrained(folder), Dinov2Model.from_pretrained(folder).eval()
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in IMAGES]
    with torch.no_grad():
        tokens = [model(**processor(images=x, return_tensors="pt")).last_hidden_state for x in pictures]
    expected = torch.cat(tokens)[:, 0]
    assert expected.std(0).mean() > 0.03
    torch.testing.assert_close(dino(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter_and_the_distance_is_of_its_features(dino, folder):
    small = Dino(str(folder), batch=2)
    torch.testing.assert_close(small(IMAGES), dino(IMAGES), rtol=1e-4, atol=1e-5)
    assert frechet_distance(small(IMAGES), dino(IMAGES)) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(dino(IMAGES), dino(255 - IMAGES)) > 0.1


def test_equal_names_mean_equal_features(dino, folder, tmp_path):
    assert dino.name.startswith("dino-tiny-")
    assert Dino(str(shutil.copytree(folder, tmp_path / "a" / "tiny"))).name == dino.name
    prepared = shutil.copytree(folder, tmp_path / "b" / "tiny") / "preprocessor_config.json"
    prepared.write_text(json.dumps(json.loads(prepared.read_text()) | {"do_center_crop": False}))
    assert Dino(str(prepared.parent)).name != dino.name


def test_what_is_missing_is_named_with_what_supplies_it(folder, tmp_path):
    def broken(name, change):
        path = shutil.copytree(folder, tmp_path / name)
        change(path)
        return str(path)

    def drop_a_weight(path):
        state = load_file(path / "model.safetensors")
        state.pop("layernorm.weight")
        save_file(state, path / "model.safetensors", {"format": "pt"})

    def another_kind(path):
        config = json.loads((path / "config.json").read_text()) | {"model_type": "vit"}
        (path / "config.json").write_text(json.dumps(config))

    for source, line in (
        ("nobody/nothing", "run: hf download nobody/nothing, or give the path of a folder"),
        (broken("bare", lambda p: (p / "model.safetensors").unlink()), "a folder needs config.json, model.safetensors"),
        (broken("unprepared", lambda p: (p / "preprocessor_config.json").unlink()), "and preprocessor_config.json"),
        (broken("torn", drop_a_weight), "lacks weights of its own configuration, e.g. layernorm.weight"),
        (
            broken("cut", lambda p: os.truncate(p / "model.safetensors", 500)),
            "has a damaged model.safetensors; a folder",
        ),
        (broken("vit", another_kind), "is a vit model; needs DINOv2"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            Dino(source)
        assert str(caught.value).startswith("dino: ")
        assert len(str(caught.value).splitlines()) == 1


def test_bad_input_is_refused(dino):
    with pytest.raises(ValueError, match=r"uint8; got \(5, 3, 70, 50\) torch.float32"):
        dino(IMAGES / 255)
