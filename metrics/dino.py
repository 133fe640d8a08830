"""DINOv2 features through transformers: the space of FD-DINOv2 (arXiv:2306.04675).

Images are prepared by the processor that the model's folder names. That of the published models resizes the shorter
side to 256 and crops 224 from the centre, where the paper's own code squeezes to 224: figures agree for square images
only roughly, so compare only what one of the two made.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.metrics.networks import check_images, fingerprint, in_batches
from fewstep.samplers.compat import declare_torchvision_operators

KINDS = ("dinov2", "dinov2_with_registers")


class Dino:
    """DINOv2 as a feature space: the class token after the last norm.

    Args:
        source: hub id, or a folder with config.json, model.safetensors and preprocessor_config.json.
        device: where the network runs.
        batch: images in one call of the network.

    Raises:
        ValueError: the model is not on this machine, is no DINOv2, or its file lacks weights.
    """

    def __init__(self, source: str = "facebook/dinov2-large", device: str | torch.device = "cpu", batch: int = 32):
        declare_torchvision_operators()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        self.device, self.batch = device, batch
        try:
            kind = AutoConfig.from_pretrained(source).model_type
            if kind not in KINDS:
                raise ValueError(f"dino: {source} is a {kind} model; needs DINOv2, e.g. facebook/dinov2-large")
            self.processor = AutoImageProcessor.from_pretrained(source)
            network, found = AutoModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
        except (OSError, SafetensorError) as error:
            wanted = "a folder needs config.json, model.safetensors and preprocessor_config.json"
            if not Path(source).is_dir():
                wanted = f"run: hf download {source}, or give the path of a folder"
            what = "is not on this machine" if isinstance(error, OSError) else "has a damaged model.safetensors"
            raise ValueError(f"dino: the model {source} {what}; {wanted}") from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"dino: {source} lacks weights of its own configuration, e.g. {missing[0]}")
        self.network = network.to(device).eval().requires_grad_(False)
        self.name = f"dino-{source}".replace("/", "-")
        if Path(source).is_dir():
            self.name = f"dino-{Path(source).name}-{fingerprint(network, self.processor.to_dict())}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 of images (N, 3, H, W) uint8."""
        check_images(images)
        return in_batches(self._features, self.batch, images)

    def _features(self, images: Tensor) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_first")
        return self.network(pixels["pixel_values"].to(self.device)).pooler_output
