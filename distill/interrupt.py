"""Ctrl-C and SIGTERM end a run after a whole iteration."""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType
from typing import Any


class Interrupted(Exception):
    """A signal ended the run after a whole iteration; a checkpoint was written."""


class Signals:
    """Within the block the first signal is only noted; one more does what it would have done without us.

    Args:
        speaks: whether this process tells the person that the signal was heard.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks
        self._since: float | None = None
        self._previous: dict[int, Any] = {}

    @property
    def came(self) -> bool:
        """Whether one came."""
        return self._since is not None

    def __enter__(self) -> Signals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: the caller owns the signals
            pass
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if self.speaks:  # not through the stream: it may be in the middle of a line
                os.write(2, b"stopping after this iteration; once more stops at once\n")
        elif time.monotonic() - self._since > 1:  # under torchrun one Ctrl-C comes twice, at about one time
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
