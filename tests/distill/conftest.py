"""Each test starts without accelerate's process-wide state: a precision set by one would be refused in the next."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

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
