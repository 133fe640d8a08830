"""What each divergence between student and teacher does to the student's sample, and with which weight.

Two kinds. An explicit one gives a direction d on the sample from predictions without graph. An implicit one gives a
potential L(x0, R, F) that is differentiated through the inputs of both networks (`implicit.direction` makes a d of
it). From there the student's loss is one line for all, `surrogate(x0, d)`, whose gradient with respect to x0 is
d / (elements).

x0: the student's sample. R, F: x0 predictions of the teacher and of the fake score at x_t = alpha x0 + sigma eps. All
(B, ...) in the units of the latents. A score difference is alpha / sigma^2 times a difference of these.
"""

import torch
from torch import Tensor

from fewstep.samplers.noise import NoiseProcess


def reverse_kl(teacher_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """d KL(student || teacher) / d x0 at one level, up to its factor (DMD, arXiv:2311.18828, eq. 7); explicit.

    alpha (s_fake - s_teacher) = (alpha / sigma)^2 (F - R); factors of the level belong to the weight.
    """
    return fake_x0 - teacher_x0


def huber(gap: Tensor, c: float) -> Tensor:
    """gap / sqrt(gap^2 + c^2) of each element: the gradient of sqrt(e^2 + c^2) - c at x0 for the target x0 - gap (TDM)."""
    return gap / (gap.square() + c * c).sqrt()


def sid(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, alpha: float) -> Tensor:
    """Potential of SiD (arXiv:2404.04057), implicit: D ((R - x0) - alpha D) of each element, D = R - F.

    At alpha = 1 it is (R - F)(F - x0). With J the Jacobian of R or F in x_t and q = R - x0 its gradient is
    -D + alpha_t J_R^T [q + (1 - 2 alpha) D] + alpha_t J_F^T [2 alpha D - q]; without the last two, as under no_grad,
    it would be DMD's F - R for any alpha. Its value has no meaning: the expectation is 0 at alpha = 1, negative above.
    """
    gap = teacher_x0 - fake_x0
    return gap * ((teacher_x0 - x0) - alpha * gap)


def sim(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, distance: str, c: float = 1e-3, power: float = 1.0) -> Tensor:
    """Potential of SIM (arXiv:2410.16794), implicit: d'(y)(x0 - F) of each element, y = F - R, through d' as well.

    For every fixed field u, E u(x_t)(F(x_t) - x0) = 0, as F = E[x0 | x_t]. Differentiated with u = d'(y) it says that
    this potential has the gradient of E d(F - R) with the x_t held. Distances d of the whole sample of N elements:

    `squared`       |y|^2:                                d' = 2 y
    `pseudo_huber`  N (sqrt(|y|^2 / N + c^2) - c):        d' = y / sqrt(|y|^2 / N + c^2); c in units of an element. The
                    paper's sqrt(|y|^2 + C^2) - C with C = c sqrt(N), times sqrt(N): elements of d' are of order 1
    `power`         N (|y|^2 / N)^(p / 2):                d' = p y (|y|^2 / N)^(p / 2 - 1); y = 0 is kept off by c
    """
    y = fake_x0 - teacher_x0
    square = y.square().flatten(1).mean(1).reshape(-1, *[1] * (y.ndim - 1))
    slope = {
        "squared": lambda: 2 * y,
        "pseudo_huber": lambda: y / (square + c * c).sqrt(),
        "power": lambda: power * y * (square + c * c) ** (power / 2 - 1),
    }[distance]()
    return slope * (x0 - fake_x0)


def mean_gap(x0: Tensor, teacher_x0: Tensor, floor: float = 1e-3) -> Tensor:
    """DMD's normaliser: mean over elements of |x0 - R|, one per sample, (B, 1, ...), float32, not under `floor`."""
    gap = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp(min=floor)
    return gap.reshape(-1, *[1] * (x0.ndim - 1))


def weighted(value: Tensor, weight: str, x0: Tensor, teacher_x0: Tensor, t: Tensor, noise: NoiseProcess) -> Tensor:
    """A direction or potential with its weight, which has no graph.

    `mean_gap`: divided by it, per sample (DMD, SiD). `alpha`: times alpha_t (1 - t of a flow: SiD there). `alpha_sigma`:
    times alpha_t sigma_t, which makes F - R sigma_t^2 (eps_R - eps_F) (VSD, SwiftBrush). `none`.
    """
    alpha, sigma = noise.levels(t, value)
    if weight == "mean_gap":
        return value / mean_gap(x0.detach(), teacher_x0.detach())
    return value * {"none": 1.0, "alpha": alpha, "alpha_sigma": alpha * sigma}[weight]


def surrogate(x0: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x0 - sg[x0 - d])^2: its value says how large d is, its gradient is d / (elements of the batch)."""
    return 0.5 * (x0 - (x0 - direction).detach()).square().mean()


@torch.no_grad()
def spread(x0: Tensor) -> Tensor:
    """Standard deviation over the batch, averaged over elements: it falls when a student collapses."""
    return x0.std(dim=0).mean() if len(x0) > 1 else torch.zeros((), device=x0.device)
