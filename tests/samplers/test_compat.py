"""The declared operators: only where torchvision's own do not load, and enough for every import.

Each test needs a fresh interpreter: what a process has declared or imported cannot be taken back.
`fake(extension)` puts a torchvision of our own before the installed one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FAKE = """
import pathlib, shutil, sys, torch
package = pathlib.Path("fake/torchvision")
package.mkdir(parents=True)
(package / "__init__.py").touch()
sys.path.insert(0, "fake")
def declared():
    return torch._C._dispatch_find_schema_or_throw("torchvision::nms", "")
def count():
    return sum(s.name.startswith("torchvision::") for s in torch._C._jit_get_all_schemas())
"""


@pytest.mark.parametrize("extension", ["(package / '_C.so').write_bytes(b'no library')", "pass"], ids=["broken", "absent"])
def test_declares_both_operators_where_the_extension_does_not_load(fresh_python: Callable[..., str], extension: str):
    code = f"{FAKE}\n{extension}" + """
from fewstep.samplers.compat import declare_torchvision_operators  # importing fewstep.samplers declares
print(declare_torchvision_operators(), count())
print(torch.ops.torchvision.nms.default._schema)
print(torch.ops.torchvision.qnms.default._schema)
"""
    assert fresh_python(code).splitlines() == [
        "True 2",
        "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ]


def test_declares_nothing_where_the_extension_loads(fresh_python: Callable[..., str]):
    """Declaring a schema that the extension registers later would abort its import; any library of torch's stands in."""
    code = FAKE + """
shutil.copy(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so", package / "_C.so")
from fewstep.samplers.compat import declare_torchvision_operators
print(declare_torchvision_operators(), count())
"""
    assert fresh_python(code) == "False 0"


def test_declares_nothing_without_torchvision(fresh_python: Callable[..., str]):
    code = FAKE + """
sys.modules["torchvision"] = None  # as if it were not installed
from fewstep.samplers.compat import declare_torchvision_operators
print(declare_torchvision_operators(), count())
"""
    assert fresh_python(code) == "False 0"


def test_every_library_imports_after_fewstep(fresh_python: Callable[..., str], tmp_path: Path):
    """With the installed torchvision, whether its operators load or not (its nms then says so when it is called)."""
    code = """
import fewstep.samplers
import gradio, open_clip, peft, timm, torch_fidelity, torchmetrics, torchvision
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPTextModel
print(CLIPTextModel.__name__, torchvision.ops.nms.__name__)
"""
    assert fresh_python(code) == "CLIPTextModel nms"
