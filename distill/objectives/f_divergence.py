"""f-divergences by a density ratio r = p / q, teacher over student at x_t (Uni-Instruct, arXiv:2505.20755; f-distill).

D_f = E_q f(r). Expanded along nu = sigma / alpha it is the integral of nu I(nu), I = E_q[h(r) |R - F|^2] / nu^4, with
h = r^2 f''(r). So everything needs h and its derivatives alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

H: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: r**0,  # f = -log r: reverse KL, DMD's
    "kl": lambda r: r,  # r log r
    "jf": lambda r: 1 + r,  # (r - 1) log r: Jeffreys
    "js": lambda r: r / (1 + r),  # r log r - (1 + r) log((1 + r) / 2): twice Jensen-Shannon
    "sf": lambda r: 1 / (1 + r),  # (1 + r) log((1 + r) / 2r): softened reverse KL
    "pearson": lambda r: 2 * r**2,  # (r - 1)^2
    "neyman": lambda r: 2 / r,  # (1 - r)^2 / r
    "sh": lambda r: r.sqrt() / 2,  # (sqrt r - 1)^2: squared Hellinger
}
"""h(r) = r^2 f''(r), by the key of f."""


FEW = 16
"""Fewer ratios say little of their mean, and one says nothing: it would be 1 by definition, and every f reverse KL."""


def weights(r: Tensor, f: str) -> tuple[Tensor, Tensor, Tensor]:
    """h, r h' and r^2 h'' at ratios r, of their shape, without graph."""
    with torch.enable_grad():
        x = r.detach().requires_grad_()
        h = H[f](x)
        (first,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    return h.detach(), (x * first).detach(), x.detach().square() * second


def density_ratio(logits: Tensor, t: Tensor, bins: int = 10) -> Tensor:
    """r at x_t, (B,), from a discriminator's logits (B, P), of which the mean is taken; no graph.

    exp of the mean within +-10, held in [0.1, 20], then divided by its mean among samples of like level, as E_q r = 1:
    in up to `bins` groups of at least 16 samples each (f-distill's recipe, arXiv:2502.15681, of 10 intervals of t). Of
    fewer samples it stays as it is.
    """
    r = logits.detach().mean(1).clamp(-10, 10).exp().clamp(0.1, 20)
    if len(r) < FEW:
        return r
    out = torch.empty_like(r)
    for rows in t.argsort().tensor_split(max(1, min(bins, len(r) // FEW))):
        out[rows] = r[rows] / r[rows].mean()
    return out


def uni_instruct(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    ratio: tuple[Tensor, Tensor, Tensor],
    nu: Tensor,
    exact: bool,
    bound: float = 10.0,
) -> Tensor:
    """Potential of Uni-Instruct, implicit, of each element; delta = R - F, eta = F - x0.

    Published: h <delta, eta>, with h = 1 SiD's at alpha 1. It holds h fixed though r depends on the student, which
    biases all but the mean. Exact, the gradient of the expanded D_f:
    2 h <delta, eta> + (h - r h') |delta|^2 + sg[(2 r h' <delta, eta> - r^2 h'' |delta|^2) / nu^2 delta] x0.

    Args:
        x0: the student's sample, (B, ...).
        teacher_x0: R.
        fake_x0: F.
        ratio: h, r h', r^2 h'' of each sample, (B,), see `weights`.
        nu: sigma / alpha, (B, 1, ...).
        exact: which of the two.
        bound: of the last term's scalar, which grows with the number of elements: one sample would own the batch.
    """
    h, slope, curve = (v.to(x0).reshape(-1, *[1] * (x0.ndim - 1)) for v in ratio)
    delta, eta = teacher_x0 - fake_x0, fake_x0 - x0
    if not exact:
        return h * delta * eta
    with torch.no_grad():
        inner, square = ((delta * v).flatten(1).sum(1).reshape(h.shape) for v in (eta, delta))
        push = ((2 * slope * inner - curve * square) / nu.square()).clamp(-bound, bound) * delta
    return 2 * h * delta * eta + (h - slope) * delta.square() + push * x0
