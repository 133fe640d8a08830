"""Routing: one part for each row, whatever else is in the batch, the same after saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.samplers.condition import Condition
from fewstep.samplers.errors import UserError
from fewstep.samplers.router import Router, pooled


def router() -> Router:
    """Four centroids in 16 dimensions."""
    source = torch.Generator().manual_seed(0)
    centroids = torch.nn.functional.normalize(torch.randn(4, 16, generator=source), dim=1)
    return Router({"centroids": centroids, "offsets": torch.tensor([0.0, 0.1, -0.1, 0.0]), "mean": torch.ones(16)})


def told(n: int) -> Condition:
    return Condition({"text_embeds": torch.randn(n, 16, generator=torch.Generator().manual_seed(1))}, n)


def test_a_row_has_one_part_whatever_its_batch(tmp_path: Path):
    """Alone, in another order and after a round trip through the file; the parts of a batch are all its rows, once."""
    made, condition = router(), told(300)
    parts = made.of(condition)
    assert set(parts.tolist()) == {0, 1, 2, 3}
    assert torch.equal(torch.cat([made.of(condition[[i]]) for i in range(300)]), parts)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(made.of(condition[order]), parts[order])
    made.save(tmp_path / "router.safetensors")
    loaded = Router.load(tmp_path / "router.safetensors")
    assert torch.equal(loaded.of(condition), parts)
    assert loaded.sha256 == made.sha256
    sides = made.rows(condition, list("abcd"), torch.device("cpu"))
    assert torch.equal(torch.cat(list(sides.values())).sort().values, torch.arange(300))
    assert made.rows(condition[:1], list("abcd"), torch.device("cpu")).keys() == {"abcd"[parts[0]]}


def test_by_brute_force():
    """argmax of the cosine to each centroid plus its offset; of equals the lowest."""
    made, condition = router(), told(50)
    e, t = pooled(condition).double() - 1, made.tensors
    scores = [
        [(row @ c).item() / row.norm().item() + b for c, b in zip(t["centroids"].double(), t["offsets"], strict=True)]
        for row in e
    ]
    assert made.of(condition).tolist() == [max(range(4), key=lambda i: s[i]) for s in scores]
    same = Router({"centroids": torch.ones(3, 1), "offsets": torch.zeros(3), "mean": torch.zeros(1)})
    assert same.nearest(torch.tensor([[1.0], [-1.0], [0.0]])).tolist() == [0, 0, 0]


def test_the_hash_is_of_every_entry():
    made = router()
    for name, value in made.tensors.items():
        other = value.clone()
        other.view(-1)[-1] += 1e-6
        assert Router(made.tensors | {name: other}).sha256 != made.sha256


def test_classes():
    """By the table; the null class, beyond it, with the last."""
    made = Router({"class_table": torch.tensor([0, 0, 1, 2])})
    assert made.parts == 3
    assert made.of(Condition({"class_labels": torch.tensor([3, 0, 2, 1, 1000])}, 5)).tolist() == [2, 0, 1, 0, 2]


def test_pooled_embeddings():
    """The pooled one where the network is told one; else the mean of the tokens that the mask keeps."""
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    assert pooled(Condition({"encoder_hidden_states": hidden}, 2)).tolist() == [[2, 3], [8, 9]]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    masked = Condition({"encoder_hidden_states": hidden, "encoder_attention_mask": mask}, 2)
    assert pooled(masked).tolist() == [[1, 2], [6, 7]]
    both = Condition({"encoder_hidden_states": hidden, "pooled_projections": torch.ones(2, 5)}, 2)
    assert pooled(both).tolist() == [[1] * 5] * 2
    with pytest.raises(UserError, match="no text and no class"):
        pooled(Condition({}, 2))


def test_what_is_no_router(tmp_path: Path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no router there"):
        Router.load(tmp_path / "router.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "router.safetensors")
    with pytest.raises(UserError, match="not a router; it holds weight"):
        Router.load(tmp_path / "router.safetensors")
