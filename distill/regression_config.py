"""Keys of a config for the regression to the teacher's own samples. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

RegressionMetric = Literal["squared", "pseudo_huber", "lpips", "emoji_judge"]


class RegressionConfig(BaseModel, frozen=True):
    """Pairs of noise and of the sample that the teacher makes of it, and how far the student's one step may be off."""

    regression_weight: float = Field(
        0.0, ge=0, description="of the student's distance to the teacher's samples of the same noise; 0 = no pairs"
    )
    regression_metric: RegressionMetric = Field(
        "squared", description="that distance: of latents, or of decoded images: lpips, emoji_judge (the embedded one)"
    )
    lpips_net: Literal["alex", "vgg", "squeeze"] = "vgg"
    lpips_weights: str | None = Field(
        None, description="a file of torchvision's weights of lpips_net; default: torchvision's cache, or downloaded"
    )
    regression_warmup_steps: int = Field(
        0, ge=0, description="iterations of the student on the pairs alone, before the scores are matched"
    )
    num_pairs: int = Field(10_000, ge=1, description="made by the teacher before the training, and cached")
    pair_steps: int = Field(50, ge=1, le=1000, description="of the teacher's ODE for each")
    pair_guidance_scale: float | None = Field(None, description="of the teacher there; default: guidance_scale")

    @property
    def decodes(self) -> bool:
        """Whether images are compared, which takes the autoencoder."""
        return self.regression_weight > 0 and self.regression_metric in ("lpips", "emoji_judge")
