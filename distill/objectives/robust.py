"""Robust distances."""

from torch import Tensor


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean of sqrt(e^2 + c^2) - c over elements e = prediction - target (LCM's published recipes, c = 1e-3).

    Elementwise; the consistency papers' form of the whole sample's norm is another loss.
    """
    return ((prediction - target).square() + c * c).sqrt().mean() - c
