"""The gradient of an implicit divergence: through the inputs of teacher and fake score, one network at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Potential = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x0, R, F) to a value for each element or sample; their sum is differentiated."""


def direction(
    potential: Potential,
    x0: Tensor,
    noised: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    fake: Callable[[Tensor], Tensor],
    split: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """d = d L(x0, R(x_t), F(x_t)) / d x0 with x_t = noised(x0), and R, F; all without graph.

    By the chain rule d = L_x + (dR/dx0)^T L_R + (dF/dx0)^T L_F. Split, the graphs of R and F are never alive together,
    and each is differentiated right after its own forward: with LoRA roles that is while its own adapter is active, so
    that checkpointing would recompute the right network. L_R and L_F need both values first, hence one more call of
    the fake score (the teacher's, guided, would cost twice that). Otherwise both graphs are kept, and no call is
    repeated. The two agree to rounding.

    Args:
        potential: see `Potential`; what must not be differentiated it detaches itself.
        x0: (B, ...); its own graph is not touched.
        noised: to x_t, of the same shape.
        teacher: x0 prediction at x_t, differentiable in it; parameters may be frozen or not, they get no gradient.
        fake: the same of the fake score.
        split: one graph at a time.
    """
    x = x0.detach().requires_grad_()
    if not split:
        with torch.enable_grad():
            x_t = noised(x)
            r, f = teacher(x_t), fake(x_t)
            total = potential(x, r, f).sum()
        (d,) = _gradient(total, (x,))
        return d, r.detach(), f.detach()
    with torch.no_grad():
        f = fake(noised(x))
    with torch.enable_grad():
        r = teacher(noised(x))
        leaves = x.detach().requires_grad_(), r.detach().requires_grad_(), f.requires_grad_()
        total = potential(*leaves).sum()
    d, of_r, of_f = _gradient(total, leaves)
    d = d + _gradient(r, (x,), of_r)[0]
    r = r.detach()
    with torch.enable_grad():
        again = fake(noised(x))
    return d + _gradient(again, (x,), of_f)[0], r, f.detach()


def _gradient(of: Tensor, to: tuple[Tensor, ...], cotangent: Tensor | None = None) -> tuple[Tensor, ...]:
    # what ran under autocast is differentiated outside of it, as the trainer does
    with torch.autocast(of.device.type, enabled=False):
        return torch.autograd.grad(of, to, cotangent, allow_unused=True, materialize_grads=True)
