"""Discriminators on the features of a denoiser, and the non-saturating losses (DMD2, Diffusion-GAN of SiD).

A logit is large where a noised sample looks real: at its optimum log p_real(x_t) / p_fake(x_t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from fewstep.distill.distiller import Role
from fewstep.samplers.adapters import bare
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser

SCALE = 256
"""Of a loss before its backward pass: half precision would keep nothing of a mean over many features, and overflows at all of N."""


class Heads(nn.Module):
    """One logit a sample from each feature map, (B, maps), float32.

    A UNet's map (B, C, height, width): DMD2's head (arXiv:2405.14867), 4x4 convolutions of stride 2 with group norm and
    SiLU, then one over what is left. A map that is shorter along a side than the example, as those of another bucket of
    sizes are, gets zeros around it. A transformer's tokens (B, N, C): two layers on each token, then their mean; ours.

    Args:
        features: examples, of which only the shapes are read.
        seed: of the weights.
    """

    def __init__(self, features: Sequence[Tensor], seed: int = 0):
        super().__init__()
        self.sizes = [f.shape[2:] if f.ndim == 4 else None for f in features]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                _conv_head(f.shape) if f.ndim == 4 else _token_head(f.shape[-1]) for f in features
            )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of features, in the order of the examples."""
        padded = (f if size is None else _at_least(f, size) for f, size in zip(features, self.sizes, strict=True))
        logits = [head(f).flatten(1).mean(1) for head, f in zip(self.heads, padded, strict=True)]
        return torch.stack(logits, 1).float()


def _at_least(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, ...) with zeros around it where it is smaller."""
    short = [max(0, want - have) for want, have in zip(size, x.shape[2:], strict=True)]
    return pad(x, [n for s in reversed(short) for n in (s // 2, s - s // 2)]) if any(short) else x


def _conv_head(shape: torch.Size) -> nn.Module:
    channels, height, width = shape[1:]
    layers: list[nn.Module] = []
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:  # at 1x1 a group of one channel has nothing to be normalised by
        groups //= 2

    def block(size: tuple[int, int], stride: int, padding: int) -> None:
        convolution = nn.Conv2d(channels, channels, size, stride, padding)
        layers.extend([convolution, nn.GroupNorm(groups, channels), nn.SiLU()])

    while min(height, width) > 4:
        block((4, 4), 2, 1)
        height, width = height // 2, width // 2
    block((min(4, height), min(4, width)), 4, 0)
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _token_head(channels: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))


def mean_logits(features: Sequence[Tensor]) -> Tensor:
    """Logits without weights of their own, (B, P): a UNet's map averaged over channels, tokens over themselves.

    SiDA's discriminator (arXiv:2410.14919), and few-step SiD's: the fake score itself learns to tell.
    """
    return torch.cat([f.mean(1).flatten(1) for f in features], 1)


class Discriminator:
    """Logits (B, P) of noised samples, from the features of a denoiser's blocks.

    Args:
        denoiser: whose blocks: the fake score's or the teacher's.
        blocks: names as of `Denoiser.features`; empty for the family's own.
        heads: layers on the features; None for `mean_logits`.
        still: the denoiser is not trained here, so that its features have a graph to the sample alone.
    """

    def __init__(self, denoiser: Denoiser, blocks: Sequence[str] = (), heads: Heads | None = None, still: bool = False):
        self.denoiser, self.blocks, self.heads, self.still = denoiser, blocks, heads, still

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and (x_t.requires_grad or not self.still)):
            features = self.denoiser.features(x_t, t, condition, self.blocks)
        return mean_logits(features) if self.heads is None else self.heads(features)


def discriminator(
    role: Role,
    kind: str,
    blocks: Sequence[str],
    seed: int,
    shape: tuple[int, ...] | None = None,
    teacher: Denoiser | None = None,
) -> Discriminator:
    """The discriminator of a fake score; `heads` are made from one call, and are the role's to train and to keep.

    Args:
        role: the fake score.
        kind: `heads` or `mean`.
        blocks: see `Discriminator`.
        seed: of the heads' weights.
        shape: of one sample, which the heads are made for; default: the pipeline's own.
        teacher: whose features are read in the place of the role's own (FastGen; LADD, arXiv:2403.12015).
    """
    if kind == "mean":
        return Discriminator(role.denoiser, blocks)
    read = teacher or role.denoiser
    home = read.device
    # roles that are to be sharded lie in main memory, where a call of a large network takes hours
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    device = torch.device("cuda") if several and home.type == "cpu" and torch.cuda.is_available() else home
    x = torch.zeros(1, *(shape or read.latent_shape()), device=device)
    with torch.no_grad():
        condition = read.encode([""]).to(device)
        networks = [bare(network).to(device) for network in read.networks.values()]
        heads = Heads(read.features(x, torch.ones(1), condition, blocks), seed).to(home)
        for network in networks:
            network.to(home)
    role.modules["discriminator"] = heads
    role.parameters |= {f"discriminator.{k}": p for k, p in heads.named_parameters()}
    return Discriminator(read, blocks, heads, still=teacher is not None)


def generator_loss(logits: Tensor) -> Tensor:
    """-log D of the student's samples: softplus(-logit), mean over a sample's logits, (B,)."""
    return softplus(-logits).mean(1)


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """softplus(logit) of fakes plus softplus(-logit) of real ones, means over a sample's logits, (B,)."""
    return softplus(fake).mean(1) + softplus(-real).mean(1)


def direction(x0: Tensor, logits: Callable[[Tensor], Tensor], bound: float | None = None) -> tuple[Tensor, Tensor]:
    """Gradient in each sample of N times its `generator_loss`, N elements a sample, (B, ...), and the logits (B, P).

    Beside a divergence's direction, whose loss is a mean over elements: so DMD2's weight of a mean over samples is the
    weight of this. Beyond `bound` a logit gives no gradient. Neither result has a graph.
    """
    x = x0.detach().requires_grad_()
    with torch.enable_grad():
        found = logits(x)
        loss = SCALE * generator_loss(found if bound is None else found.clamp(-bound, bound)).sum()
    with torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient * (x0[0].numel() / SCALE), found.detach()
