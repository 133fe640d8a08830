"""Manifolds against brute force over every pair, and what precision and recall are there to tell apart."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.metrics import manifolds as module
from fewstep.metrics.manifolds import manifolds, radii


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def brute(samples: torch.Tensor, reference: torch.Tensor, k: int, k_density: int) -> dict[str, float]:
    """The definitions, vector by vector."""

    def radius(features, i, neighbours):
        others = sorted(math.dist(features[i], f) for j, f in enumerate(features.tolist()) if j != i)
        return others[neighbours - 1]

    n, m = len(samples), len(reference)
    apart = [[math.dist(s, r) for r in reference.tolist()] for s in samples.tolist()]
    tight = [radius(reference, j, k) for j in range(m)]
    wide = [radius(reference, j, k_density) for j in range(m)]
    near = [radius(samples, i, k) for i in range(n)]
    return {
        "precision": sum(any(apart[i][j] <= tight[j] for j in range(m)) for i in range(n)) / n,
        "recall": sum(any(apart[i][j] <= near[i] for i in range(n)) for j in range(m)) / m,
        "density": sum(apart[i][j] <= wide[j] for i in range(n) for j in range(m)) / (k_density * n),
        "coverage": sum(any(apart[i][j] <= wide[j] for i in range(n)) for j in range(m)) / m,
    }


@pytest.mark.parametrize("tile", [2048, 11])
@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (4, 2)])
def test_equal_to_brute_force_in_any_tiling(monkeypatch, tile, k, k_density):
    monkeypatch.setattr(module, "TILE", tile)
    samples, reference = normal(50, 4, seed=0) * 1.5 + 0.7, normal(65, 4, seed=1)
    found = manifolds(samples, reference, k, k_density)
    expected = brute(samples, reference, k, k_density)
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(expected, abs=1e-12)
    assert all(0 < value != 1 for value in expected.values())


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    samples, reference = normal(300, 6, seed=2) * 0.7, normal(260, 6, seed=3)
    theirs = prc_features_to_metric(samples, reference, verbose=False)
    found = manifolds(samples, reference)
    assert found["precision"][0] == pytest.approx(theirs[KEY_METRIC_PRECISION], abs=1e-6)
    assert found["recall"][0] == pytest.approx(theirs[KEY_METRIC_RECALL], abs=1e-6)


def test_far_from_the_origin_in_single_precision():
    """|x|^2 - 2 xy + |y|^2 would lose every digit of the distances; the shift is exact in float32."""
    samples, reference = (normal(80, 3, seed=s).mul(64).round().div(64).float() for s in (4, 5))
    assert manifolds(samples + 4096, reference + 4096) == manifolds(samples, reference)


def test_radii_are_to_others_and_ascend():
    x = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
    assert radii(x, 3).tolist() == [[1, 9, 9], [1, 4, 4], [0, 4, 9], [0, 4, 9]]


def test_dropped_classes_cost_recall_and_coverage_and_no_precision():
    """Eight classes far apart; the samples know all, or the first four as often as all together."""
    centers = 20 * normal(8, 6, seed=6)

    def drawn(classes: int, seed: int) -> torch.Tensor:
        return normal(480, 6, seed=seed) + centers[torch.arange(480) % classes]

    full, half = (manifolds(drawn(classes, seed=7), drawn(8, seed=8)) for classes in (8, 4))
    for name in ("recall", "coverage"):
        assert half[name][0] == pytest.approx(full[name][0] / 2, abs=0.06)
        assert full[name][0] > 0.8
    assert half["precision"][0] == pytest.approx(full["precision"][0], abs=4 * full["precision"][1])
    assert full["precision"][0] > 0.8


def test_samples_out_of_the_manifold_cost_precision_and_no_recall():
    reference, samples = normal(400, 4, seed=9), normal(400, 4, seed=10)
    good = manifolds(samples, reference)
    bad = manifolds(torch.cat([samples, normal(400, 4, seed=11) + 50]), reference)
    assert bad["precision"][0] == pytest.approx(good["precision"][0] / 2)
    assert bad["density"][0] == pytest.approx(good["density"][0] / 2)
    assert bad["recall"][0] == good["recall"][0]
    assert bad["coverage"][0] == good["coverage"][0]


def test_errors_are_those_of_shares():
    value, error = manifolds(normal(300, 4, seed=12), normal(300, 4, seed=13))["precision"]
    assert error == pytest.approx(math.sqrt(value * (1 - value) / 299))


def test_too_few_vectors_are_refused():
    x = normal(20, 4, seed=14)
    with pytest.raises(ValueError, match="5 neighbours need 6 vectors; got 20 and 5"):
        manifolds(x, x[:5])
    with pytest.raises(ValueError, match="two feature spaces"):
        manifolds(x, x[:, :2])
