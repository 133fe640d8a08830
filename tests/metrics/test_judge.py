from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill.teachers import judge as training
from fewstep.distill.teachers.judge import batch, caption_of, contrastive, retrieval, true_captions
from fewstep.metrics.emoji.drawings import (
    COLORS,
    HELD_OUT,
    NAMES,
    color_of,
    compositions,
    drawings_of,
    full_caption,
    render,
)
from fewstep.metrics.emoji.judge import FEATURES, WEIGHTS, features, load, similarity, tokens
from fewstep.metrics.frechet import frechet_distance


def pictures(made) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(c) for c in made])).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return features(pictures(compositions(400, seed=41_000)))


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return pictures(compositions(400, seed=42_000))


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-6, 7) / sigma).square())
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).expand(3, 1, 13, 13)
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (6,) * 4, "replicate"), kernel, groups=3)


def noisy(x: torch.Tensor, std: float) -> torch.Tensor:
    return (x + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def test_retrieval_of_held_out_pairs():
    """The nearest of all full captions is true of the picture, for pairs that no training saw."""
    made = compositions(6 * len(HELD_OUT), seed=43_000, pairs=sorted(HELD_OUT))
    assert retrieval(load(), pictures(made), [(c.drawing, c.color) for c in made]) >= 0.95


@pytest.mark.parametrize(("change", "amounts"), [(blurred, (0.5, 0.8, 1.2, 2.0)), (noisy, (0.02, 0.05, 0.1, 0.2))])
def test_distance_rises_with_damage(reference, real, change, amounts):
    distances = [frechet_distance(reference, features(x)) for x in (real, *(change(real, a) for a in amounts))]
    assert all(a < b for a, b in pairwise(distances)), distances


def test_distance_rises_with_every_drawing_dropped(reference):
    """A student that forgot drawings: ever fewer of them, on all colours, as many pictures."""
    distances = []
    for kept in (40, 35, 30, 20, 10, 3):
        pairs = [(d, c) for d in range(0, len(NAMES)) for c in range(len(COLORS)) if (17 * d) % 40 < kept]
        distances.append(frechet_distance(reference, features(pictures(compositions(400, 44_000, pairs)))))
    assert all(a < b for a, b in pairwise(distances)), distances


def test_distance_rises_with_blending(reference, real):
    """What few steps do: each picture mixed with another of the same background."""
    made = compositions(400, seed=42_000)
    other = pictures([c._replace(drawing=(c.drawing + 8) % len(NAMES)) for c in made])
    distances = [frechet_distance(reference, features(torch.lerp(real, other, w))) for w in (0, 0.1, 0.2, 0.35, 0.5)]
    assert all(a < b for a, b in pairwise(distances)), distances


def test_score_prefers_what_is_true(real):
    """Of each kind of caption the true one scores higher than one that differs in the drawing or the colour alone."""
    made = compositions(400, seed=42_000)
    seen = features(real)
    for level in ("full", "category"):
        true = similarity(seen, [caption_of(c.drawing, c.color, level) for c in made])
        drawing = similarity(seen, [caption_of((c.drawing + 8) % len(NAMES), c.color, level) for c in made])
        color = similarity(seen, [caption_of(c.drawing, (c.color + 1) % 10, level) for c in made])
        assert (true > drawing).float().mean() > 0.97
        assert (true > color).float().mean() > 0.97


def test_asset_is_small_and_its_features_are_few():
    assert WEIGHTS.stat().st_size <= 6_000_000
    assert FEATURES <= 128
    assert all(p.dtype == torch.float32 for p in load().parameters())


def test_integer_and_float_images_are_judged_alike_in_any_batch(real):
    x = (real[:9] * 255).round().to(torch.uint8)
    torch.testing.assert_close(features(x, batch=4), features(x.float() / 255), atol=1e-5, rtol=1e-4)


def test_unreadable_captions_and_images_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'unicorn'"):
        tokens(["a red apple", "a unicorn on a blue background"])
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 64\); got \(1, 3, 32, 32\)"):
        features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="uint8 or float"):
        features(torch.zeros(1, 3, 64, 64, dtype=torch.int64))


def test_truth_of_captions_is_what_the_captions_say():
    """`true_captions` against the readers of `drawings`, for every picture and every caption with a drawing."""
    for d in range(0, len(NAMES), 7):
        for c in range(len(COLORS)):
            for level in ("full", "category", "any color"):
                caption = caption_of(d, c, level)
                assert d in drawings_of(caption)
                assert color_of(caption) in (c, None)
                for other in ((d + 8) % len(NAMES), (d + 1) % len(NAMES)):
                    expected = other in drawings_of(caption) and caption != full_caption(d, c)
                    assert (caption in true_captions(other, c)) == expected


def test_batches_are_functions_of_their_number():
    images, texts, true = batch(3)
    again, other = batch(3), batch(4)
    assert torch.equal(images, again[0])
    assert texts == again[1]
    assert not torch.equal(images, other[0])
    assert true.any(0).all()
    assert true.any(1).all()


def test_interrupted_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REPORT", 1)
    monkeypatch.setattr(training, "BATCH", 8)
    training.main(str(tmp_path / "straight"), 3)

    def power_cut(iteration: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        if iteration == 2:
            raise KeyboardInterrupt
        return batch(iteration)

    monkeypatch.setattr(training, "batch", power_cut)
    with pytest.raises(KeyboardInterrupt):
        training.main(str(tmp_path / "cut"), 3)
    monkeypatch.setattr(training, "batch", batch)
    training.main(str(tmp_path / "cut"), 3)
    straight, cut = (load_file(tmp_path / name / "judge.safetensors") for name in ("straight", "cut"))
    assert all(torch.equal(straight[name], cut[name]) for name in straight)


def test_contrastive_loss_of_two_pictures_and_three_captions():
    """Logits 0 everywhere: log 3 a row and log 2 a column, whatever is true; a true logit of +inf leaves shared truth."""
    true = torch.tensor([[True, False, True], [False, True, True]])
    zero = torch.zeros(2, 3)
    assert contrastive(zero, true).item() == pytest.approx((np.log(3) + np.log(2)) / 2)
    sure = torch.where(true, 50.0, 0.0)
    assert contrastive(sure, true).item() == pytest.approx((np.log(2) + np.log(2) / 3) / 2)
