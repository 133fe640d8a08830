"""An Inception of the right architecture with random weights, for tests that download nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """He's initialisation, which keeps the scale of the features over 40 layers; torch's own loses it."""
    from torch_fidelity import FeatureExtractorInceptionV3

    class Unread(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **options):
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    network = Unread("unread", ["2048"], str(folder / "empty.pth"))
    generator = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        if p.ndim > 1:
            p.normal_(0, (2 / p[0].numel()) ** 0.5, generator=generator)
        elif "bn.weight" not in name:
            p.normal_(0, 0.1, generator=generator)
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"
