"""Which of several students takes a condition (multi-student distillation, arXiv:2410.23274): a pure function of its row."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fewstep.samplers.condition import Condition
from fewstep.samplers.errors import UserError

ROUTER = "router.safetensors"
POOLED = ("text_embeds", "pooled_projections")
"""Names of the pooled text embedding in a condition, where the network is told one."""


def pooled(condition: Condition) -> Tensor:
    """One embedding of each prompt, (B, d), float32, on the CPU: the pooled one, or the mean of the tokens.

    Masked tokens do not count. UserError for a condition without text.
    """
    tensors = condition.tensors
    for name in POOLED:
        if name in tensors:
            return tensors[name].float().cpu()
    if "encoder_hidden_states" not in tensors:
        raise UserError("parts: conditions of this pipeline have no text and no class to split them by")
    hidden = tensors["encoder_hidden_states"].float().cpu()
    mask = tensors.get("encoder_attention_mask")
    mask = torch.ones(hidden.shape[:2]) if mask is None else mask.float().cpu()
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def key_of(condition: Condition) -> Tensor:
    """What rows are split by, on the CPU: classes (B,), int64, or embeddings (B, d), see `pooled`."""
    labels = condition.tensors.get("class_labels")
    return pooled(condition) if labels is None else labels.cpu()


def directions(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Embeddings (B, d) less their mean, of length 1; the mean itself is 0."""
    return torch.nn.functional.normalize(embeddings - mean, dim=1)


@dataclass(frozen=True)
class Router:
    """Part 0..P-1 of each row: the nearest centroid after an offset, or the entry of a table of classes.

    Attributes:
        tensors: `centroids` (P, d) of length 1, `offsets` (P,), `mean` (d,), all float32; or `class_table` (classes,), int64.
    """

    tensors: dict[str, Tensor]

    @property
    def parts(self) -> int:
        """P."""
        table = self.tensors.get("class_table")
        return len(self.tensors["centroids"]) if table is None else int(table.max()) + 1

    def of(self, condition: Condition) -> Tensor:
        """(B,), int64, on the CPU. A class beyond the table, such as the null class, goes with its last."""
        return self.of_keys(key_of(condition))

    def of_keys(self, keys: Tensor) -> Tensor:
        """The same of what `key_of` said."""
        table = self.tensors.get("class_table")
        return self.nearest(keys) if table is None else table[keys.clamp(max=len(table) - 1)]

    def nearest(self, embeddings: Tensor) -> Tensor:
        """Of embeddings (B, d): argmax of e . C + b, the lowest of equals.

        In float64 and a row at a time: a batched product rounds differently in a batch of another size.
        """
        centroids, offsets = self.tensors["centroids"].double(), self.tensors["offsets"].double()
        rows = directions(embeddings, self.tensors["mean"]).double()
        return torch.stack([((row * centroids).sum(1) + offsets).argmax() for row in rows])

    def rows(self, condition: Condition, names: list[str], device: torch.device) -> dict[str, Tensor]:
        """Rows of a batch by the name of the student that takes them; those that take none are left out."""
        part = self.of(condition).to(device)
        sides = {name: (part == i).nonzero()[:, 0] for i, name in enumerate(names)}
        return {name: rows for name, rows in sides.items() if len(rows)}

    @property
    def sha256(self) -> str:
        """Of the names, shapes and bytes of the tensors."""
        digest = sha256()
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        from safetensors.torch import save_file

        temporary = path.with_name(f".{path.name}.tmp")
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Router:
        """The inverse of `save`; UserError where there is none."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no router there ({type(error).__name__})") from error
        if tensors.keys() not in ({"centroids", "offsets", "mean"}, {"class_table"}):
            raise UserError(f"{path}: not a router; it holds {', '.join(sorted(tensors))}")
        return cls(tensors)
