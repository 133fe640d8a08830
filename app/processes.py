"""The processes of one command: who is first, who waits, whose parts are put together."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch

from fewstep.distill.evaluation import Progress, bar
from fewstep.samplers.errors import UserError

T = TypeVar("T")


class Processes:
    """One process, or those that accelerate or torchrun started."""

    def __init__(self) -> None:
        from accelerate import PartialState

        # without cpu=True accelerate would let each of a launcher's processes think that it is alone;
        # and the first may read a reference for long while the others wait
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))
        self.rank, self.world = self._state.process_index, self._state.num_processes
        if self.world != (started := int(os.environ.get("WORLD_SIZE", "1"))):
            raise UserError(f"started as {started} processes, but they cannot speak to each other; start one")

    @property
    def first(self) -> bool:
        """Whether this one prints and writes the report."""
        return self.rank == 0

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """This process's part of a list that all know: each one world-th."""
        return parts[self.rank :: self.world]

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def together(self, part: Any) -> Any:
        """The sum of what all processes have."""
        if self.world == 1:
            return part
        from accelerate.utils import gather_object

        return reduce(lambda a, b: a + b, gather_object([part]))

    def bar(self, total: int, description: str) -> AbstractContextManager[Progress | None]:
        """A progress bar of the first process over its own share."""
        return bar(total, description) if self.first else nullcontext()

    def say(self, line: str) -> None:
        """A line of the first process."""
        if self.first:
            print(line, file=sys.stderr)
