"""Between images and the latents of a diffusers `AutoencoderKL`, scaled and shifted as its config says."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def latents_of_images(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 to latents, the mode of the encoder, float32."""
    latents = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode().float()
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def images_of_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents to images (B, 3, H, W), 0..1 but unclamped, float32, differentiable."""
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5
