"""The declared operators: only where torchvision's own do not load, and enough for every import.

Each test needs a fresh interpreter: what a process has declared or imported cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

# a torchvision of our own stands before the installed one; importing fewstep.samplers already declares
DECLARE = """
import os, sys, torch
os.makedirs("fake/torchvision")
open("fake/torchvision/__init__.py", "w").close()
sys.path.insert(0, "fake")
{given}
from fewstep.samplers.compat import declare_torchvision_operators
print(declare_torchvision_operators())
print(*[s for s in torch._C._jit_get_all_schemas() if s.name.startswith("torchvision::")], sep="\\n")
"""
GARBAGE = "open('fake/torchvision/_C.so', 'w').write('no library')"
# any library that loads stands in for torchvision's
LOADS = "os.symlink(os.path.join(torch.__path__[0], 'lib', 'libtorch_global_deps.so'), 'fake/torchvision/_C.so')"


@pytest.mark.parametrize("given", [GARBAGE, ""], ids=["broken", "absent"])
def test_declares_both_operators_where_the_extension_does_not_load(fresh_python: Callable[..., str], given: str):
    answer, *schemas = fresh_python(DECLARE.format(given=given)).splitlines()
    assert answer == "True"
    assert sorted(schemas) == [
        "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ]


@pytest.mark.parametrize("given", [LOADS, "sys.modules['torchvision'] = None"], ids=["loads", "not installed"])
def test_declares_nothing_where_it_is_not_needed(fresh_python: Callable[..., str], given: str):
    """A schema declared before the extension registers its own would abort torchvision's import."""
    assert fresh_python(DECLARE.format(given=given)) == "False"


def test_every_library_imports_after_fewstep(fresh_python: Callable[..., str]):
    """With the installed torchvision, whether its operators load or not."""
    code = """
        import fewstep.samplers
        import gradio, open_clip, peft, timm, torch_fidelity, torchmetrics, torchvision
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
        from torchmetrics.image.fid import FrechetInceptionDistance
        from transformers import CLIPTextModel
        print(CLIPTextModel.__name__, torchvision.ops.nms.__name__)
    """
    assert fresh_python(code) == "CLIPTextModel nms"
