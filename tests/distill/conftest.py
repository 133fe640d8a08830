"""Each test starts without accelerate's process-wide state: a precision set by one would be refused in the next."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import accelerate.utils.imports
import pytest

# in every step and every backward pass accelerate looks on the disk for a package: a tenth of a small training
accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)


@pytest.fixture(autouse=True)
def no_accelerate_state() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the preflights of a test get from stock pipelines, to compare their teachers with: one that cannot goes on."""
    from fewstep.distill import safeguards

    found: list[Any] = []
    stock = safeguards.stock_images
    monkeypatch.setattr(safeguards, "stock_images", lambda *a, **k: found.append(stock(*a, **k)) or found[-1])
    return found
