"""The declared operators: only where torchvision's own do not load, and enough for every import."""

from __future__ import annotations

import json
from collections.abc import Callable

# Each case is a process of its own, since what one has declared or imported cannot be taken back, but torch is imported once.
# A torchvision of our own stands before the installed one; importing fewstep.samplers already declares.
DECLARE = """
import json, os, sys, torch

def answer(name, given):
    os.makedirs(f"{name}/torchvision")
    os.chdir(name)
    open("torchvision/__init__.py", "w").close()
    sys.path.insert(0, os.getcwd())
    exec(given)
    from fewstep.samplers.compat import declare_torchvision_operators
    declared = declare_torchvision_operators()
    schemas = [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("torchvision::")]
    print(json.dumps([name, declared, sorted(schemas)]), flush=True)

for name, given in CASES.items():
    if not (child := os.fork()):
        answer(name, given)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
CASES = {
    "broken": "open('torchvision/_C.so', 'w').write('no library')",
    "absent": "",
    # any library that loads stands in for torchvision's
    "loads": "os.symlink(os.path.join(torch.__path__[0], 'lib', 'libtorch_global_deps.so'), 'torchvision/_C.so')",
    "not installed": "sys.modules['torchvision'] = None",
}
BOTH = [
    "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
]


def test_declares_both_operators_only_where_the_extension_does_not_load(fresh_python: Callable[..., str]):
    """A schema declared before the extension registers its own would abort torchvision's import."""
    lines = fresh_python(f"CASES = {CASES!r}\n{DECLARE}").splitlines()
    assert [json.loads(line) for line in lines] == [
        ["broken", True, BOTH],
        ["absent", True, BOTH],
        ["loads", False, []],
        ["not installed", False, []],
    ]


def test_every_library_imports_after_fewstep():
    """With the installed torchvision, whether its operators load or not; tests/conftest.py has imported fewstep.samplers."""
    import gradio  # noqa: F401
    import open_clip  # noqa: F401
    import peft  # noqa: F401
    import timm  # noqa: F401
    import torch_fidelity  # noqa: F401
    import torchvision
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: F401
    from transformers import CLIPTextModel

    assert (CLIPTextModel.__name__, torchvision.ops.nms.__name__) == ("CLIPTextModel", "nms")
