"""Directions d on the student's sample: what each divergence between student and teacher does to x0.

The student's loss is the same line for all, `surrogate(x0, d)`, whose gradient with respect to x0 is d / (elements).
Predictions are of x0, (B, ...), in the units of the latents, without graph.
"""

import torch
from torch import Tensor


def reverse_kl(teacher_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """d KL(student || teacher) / d x0 at one level, up to its factor (DMD, arXiv:2311.18828, eq. 7).

    alpha (s_fake - s_teacher) = (alpha / sigma)^2 (F - R); factors of the level belong to the weight.
    """
    return fake_x0 - teacher_x0


def mean_gap(x0: Tensor, teacher_x0: Tensor, floor: float = 1e-3) -> Tensor:
    """DMD's normaliser: mean over elements of |x0 - R|, one per sample, (B, 1, ...), float32, not under `floor`."""
    gap = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp(min=floor)
    return gap.reshape(-1, *[1] * (x0.ndim - 1))


def surrogate(x0: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x0 - sg[x0 - d])^2: its value says how large d is, its gradient is d / (elements of the batch)."""
    return 0.5 * (x0 - (x0 - direction).detach()).square().mean()


@torch.no_grad()
def spread(x0: Tensor) -> Tensor:
    """Standard deviation over the batch, averaged over elements: it falls when a student collapses."""
    return x0.std(dim=0).mean() if len(x0) > 1 else torch.zeros((), device=x0.device)
