"""Train a student: `train(config)`, and `load_config` for a config with overrides.

Both are imported when used, so that the command line reads and refuses configs without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.distill.config import load_config
    from fewstep.distill.run import train

__all__ = ["load_config", "train"]

_HOMES = {"load_config": "fewstep.distill.config", "train": "fewstep.distill.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
