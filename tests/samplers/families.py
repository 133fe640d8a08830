"""One denoiser of each family for the tests of what all have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.plan import generators
from fewstep.samplers.rules import randn
from tests.pipelines import (
    PROMPTS,
    tiny_classes,
    tiny_ddpm,
    tiny_dit,
    tiny_pixart,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_wan,
)
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl

SIZE = {"height": 64, "width": 64, "frames": 5}
"""Of a tiny clip."""
SIZES: dict[str, dict[str, int]] = {
    "wan": SIZE,
    "flux": {"height": 16, "width": 16},
    "sana": {"height": 32, "width": 32},
}
"""Where the pipeline's own size is large."""


@cache
def family(name: str) -> Denoiser:
    """One denoiser of each family; Wan with two transformers."""
    build: dict[str, Callable[[], Any]] = {
        "stable_diffusion": lambda: tiny_stable_diffusion(prediction_type="v_prediction"),
        "stable_diffusion_3": tiny_stable_diffusion_3,
        "stable_diffusion_xl": tiny_stable_diffusion_xl,
        "flux": tiny_flux,
        "sana": tiny_sana,
        "wan": lambda: tiny_wan(two_transformers=True),
        "dit": tiny_dit,
        "pixart": lambda: tiny_pixart(micro_conditions=True),
        "unet2d_classes": tiny_classes,
        "unet2d": tiny_ddpm,
    }
    return denoiser_of(build[name]())


PROMPTED = (
    "stable_diffusion",
    "stable_diffusion_3",
    "stable_diffusion_xl",
    "flux",
    "sana",
    "wan",
    "dit",
    "pixart",
    "unet2d_classes",
)
FAMILIES = (*PROMPTED, "unet2d")
LABELS: dict[str, tuple[list[str], str]] = {"dit": (["goldfish", "208"], ""), "unet2d_classes": (["0", "3"], "4")}
"""Prompts and negative prompt of class-conditional families."""


def inputs(name: str, rows: int = 2) -> tuple[Denoiser, Tensor, Any]:
    denoiser = family(name)
    x = randn((rows, *denoiser.latent_shape(**SIZES.get(name, {}))), generators(range(rows)))
    prompts, negative = LABELS.get(name, (PROMPTS, "blurry"))
    return denoiser, x, denoiser.encode([prompts[i % 2] for i in range(rows)], negative)
