"""CLIP score and similarity beside open_clip's plain use and torchmetrics, with random weights from a folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from fewstep.metrics.clip import Clip, clip_score
from tests.metrics.tiny_clip import noise_images, save_tiny_clip

PROMPTS = ["a red apple", "Two  DOGS &amp; a cat", "a" + " very" * 40 + " long caption", "", "snow in June"]
IMAGES = noise_images(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    return Clip(str(folder))


@pytest.fixture(scope="module")
def plain(folder):
    """(image features, text features) as open_clip's README computes them, and its parts."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in IMAGES]
    with torch.no_grad():
        images = torch.cat([model.encode_image(preprocess(picture).unsqueeze(0)) for picture in pictures])
        texts = torch.cat([model.encode_text(tokenizer([prompt])) for prompt in PROMPTS])
    return images, texts, model, preprocess, tokenizer


class ForTorchmetrics:
    """open_clip's parts under the names that torchmetrics calls."""

    def __init__(self, model, preprocess, tokenizer):
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self.config = None

    def to(self, device):
        return self

    def eval(self):
        return self

    def __call__(self, images=None, text=None, **_):
        if images is not None:
            pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
            return {"pixel_values": torch.stack([self.preprocess(picture) for picture in pictures])}
        tokens = self.tokenizer(text)
        return {"input_ids": tokens, "attention_mask": tokens > 0}

    def get_image_features(self, pixels):
        return self.model.encode_image(pixels).detach()

    def get_text_features(self, tokens, mask):
        return self.model.encode_text(tokens).detach()


def test_features_are_those_of_open_clip(clip, folder, plain):
    images, texts, *_ = plain
    torch.testing.assert_close(clip(IMAGES), images, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.texts(PROMPTS), texts, rtol=1e-5, atol=1e-6)
    unit = Clip(str(folder), unit=True)
    torch.testing.assert_close(unit(IMAGES), images / images.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unit.scores(IMAGES, PROMPTS), clip.scores(IMAGES, PROMPTS))


def test_the_score_is_that_of_torchmetrics(clip, plain):
    """Of single pairs, of sets on both sides of 0, and of two images."""
    from torchmetrics.functional.multimodal import clip_score as reference
    from torchmetrics.multimodal import CLIPScore

    parts = ForTorchmetrics(*plain[2:])

    def by_torchmetrics(images, others) -> float:
        return reference(list(images), others, lambda: (parts, parts)).item()

    scores = clip.scores(IMAGES, PROMPTS)
    low, high = scores.argsort()[:2], scores.argsort()[-2:]
    assert scores[low].mean() < 0 < scores[high].mean()
    for rows in (low, high, high[:1], low[:1], torch.arange(5)):
        expected = by_torchmetrics(IMAGES[rows], [PROMPTS[i] for i in rows])
        assert clip_score(scores[rows])[0] == pytest.approx(expected, abs=1e-4)
    assert clip_score(scores[high])[1] == pytest.approx((scores[high[1]] - scores[high[0]]).abs().item() / 2)

    streamed = CLIPScore(lambda: (parts, parts))
    streamed.update(list(IMAGES[high[:1]]), [PROMPTS[high[0]]])
    streamed.update(list(IMAGES[high[1:]]), [PROMPTS[high[1]]])
    assert clip_score(scores[high])[0] == pytest.approx(streamed.compute().item(), abs=1e-4)

    others = IMAGES.flip(-1)
    similarity = clip.similarity(IMAGES, others)
    assert 100 * similarity.mean().item() == pytest.approx(by_torchmetrics(IMAGES, list(others)), abs=1e-4)
    torch.testing.assert_close(clip.similarity(IMAGES, IMAGES), torch.ones(5))


def test_batches_do_not_matter(clip, folder):
    small = Clip(str(folder), batch=2)
    torch.testing.assert_close(small.scores(IMAGES, PROMPTS), clip.scores(IMAGES, PROMPTS), atol=1e-4, rtol=0)


def test_equal_names_mean_equal_features(clip, folder, tmp_path):
    """Folders of one name: the same weights, others, and the same prepared otherwise; unit vectors."""
    assert clip.name.startswith("clip-tiny-")
    assert Clip(str(shutil.copytree(folder, tmp_path / "a" / "tiny"))).name == clip.name
    other = Clip(str(save_tiny_clip(tmp_path / "b" / "tiny", seed=1)))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"
    squeezed = shutil.copytree(folder, tmp_path / "c" / "tiny")
    (squeezed / "open_clip_config.json").write_text(json.dumps(config))
    names = {clip.name, other.name, Clip(str(squeezed)).name, Clip(str(folder), unit=True).name}
    assert len(names) == 4


def test_the_activation_follows_the_tag(folder, monkeypatch):
    """OpenAI's weights want QuickGELU whatever the name of the model; open_clip warns and computes something else."""
    import open_clip
    import open_clip.factory

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-quickgelu", config | {"quick_gelu": True})
    file = str(folder / "open_clip_model.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"theirs": {"file": file, "quick_gelu": True}})

    by_tag, by_file = Clip("Tiny", "theirs"), Clip("Tiny-quickgelu", file)
    assert by_tag.name == "clip-Tiny-theirs"
    torch.testing.assert_close(by_tag.texts(PROMPTS), by_file.texts(PROMPTS))
    assert (by_tag.texts(PROMPTS) - Clip("Tiny", file).texts(PROMPTS)).abs().max() > 1e-3


def test_what_is_missing_is_named_with_what_supplies_it(folder, tmp_path, monkeypatch):
    import open_clip

    def offline(tag):
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    wide = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"] | {"embed_dim": 48}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Wide", wide)
    file = folder / "open_clip_model.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / file.name).unlink()
    for model, weights, line in (
        ("ViT-L-14", "openai", r"run: hf download timm/vit_large_patch14_clip_224.openai "),
        ("ViT-B-32", "laion400m_e32", r"laion400m_e32 of ViT-B-32 are not .* run: (hf download|curl) "),
        ("ViT-B-32", "nobody", "has no weights nobody; give a file or one of: openai, laion400m_e31"),
        ("ViT-B-32", None, "has no weights None; give a file or one of"),
        ("ViT-B-33", "openai", r"neither a folder nor a model of open_clip; .*ViT-B-32"),
        ("Wide", str(file), "cannot be used: .*size mismatch.*; give weights that were trained for Wide"),
        (str(empty), None, "a folder needs open_clip_config.json and open_clip_model.safetensors"),
        (str(bare), None, "a folder needs open_clip_config.json and open_clip_model.safetensors"),
        ("hf-hub:nobody/nothing", None, "run: hf download nobody/nothing"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            Clip(model, weights)
        assert str(caught.value).startswith("clip: ")
        assert len(str(caught.value).splitlines()) == 1


def test_bad_input_is_refused(clip):
    with pytest.raises(ValueError, match="one prompt for each image; got 5 and 4"):
        clip.scores(IMAGES, PROMPTS[:4])
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\) uint8; got \(5, 3, 40, 56\) torch.float32"):
        clip(IMAGES.float())
    with pytest.raises(ValueError, match="5 and 2 images"):
        clip.similarity(IMAGES, IMAGES[:2])
