"""Fingerprints: which weights they take for the same."""

from __future__ import annotations

import copy

import pytest
import torch

from fewstep.samplers.load import denoiser_of
from fewstep.samplers.manifest import fingerprint, fingerprint_of, same_weights
from tests.pipelines import tiny_ddpm
from tests.samplers.students import scale_weights, trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fingerprint_is_the_same_in_half_precision(dtype: torch.dtype):
    module = tiny_ddpm().unet
    mark = fingerprint_of({"unet": module})
    assert same_weights(fingerprint_of({"unet": module.to(dtype)}), mark)
    assert same_weights(mark, fingerprint_of({"unet": module.to(torch.bfloat16)}))


def test_a_fingerprint_sees_light_fine_tuning_and_no_adapters():
    """Scaling flips no sign; noise of 1% of each weight's spread; a change of one layer kind alone."""
    module = tiny_ddpm().unet
    mark = fingerprint_of({"unet": module})

    def scaled(m: torch.nn.Module) -> None:
        scale_weights(m, 0.99)

    def noisy(m: torch.nn.Module) -> None:
        random = torch.Generator().manual_seed(0)
        for p in m.parameters():
            p.data += 0.01 * p.data.std(correction=0) * torch.randn(p.shape, generator=random)

    def attention(m: torch.nn.Module) -> None:
        for k, p in m.named_parameters():
            if "to_q.weight" in k:
                p.data *= 1.02

    for tune in (scaled, noisy, attention):
        other = copy.deepcopy(module)
        tune(other)
        assert not same_weights(fingerprint_of({"unet": other}), mark), tune.__name__
    assert not same_weights(fingerprint_of({"transformer": module}), mark)
    denoiser = denoiser_of(tiny_ddpm())
    assert fingerprint(denoiser) == mark
    trained(denoiser, "lora")
    assert fingerprint(denoiser) == mark
