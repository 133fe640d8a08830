"""What has to happen before other imports.

A torchvision whose compiled operators do not load stands beside a CPU-only torch: without its operators
`import torchvision` fails (`operator torchvision::nms does not exist`), and with it transformers, peft, diffusers
models, open_clip and torchmetrics. Declaring two schemas cures every import.

A group of processes ends when it is destroyed: `torch.distributed.nn` takes the group that is there when it is first
imported, as any optimiser does, for the default of its functions, and so keeps it and its threads until Python ends.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

if torch.distributed.is_available():
    import torch.distributed.nn

_kept: list[torch.library.Library] = []  # a library's declarations end with the object


def declare_torchvision_operators() -> bool:
    """Declare `torchvision::nms` and `qnms` where the installed torchvision cannot; True if that was needed."""
    spec = find_spec("torchvision")
    if _kept or spec is None or spec.origin is None:
        return bool(_kept)
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
            return False  # torchvision will load the same file again, to no effect
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return True
