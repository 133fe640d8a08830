"""The one exception that a user's mistake raises; the command line prints it as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What is wrong, where, and what would be right, in one line."""


@contextmanager
def one_line(said: str) -> Iterator[None]:
    """Within the block any error, as diffusers, transformers, peft, safetensors and the hub each have their own, is one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = type(error).__name__
        raise UserError(f"{said}: {kind}: {lines[0] if lines else 'no message'}") from error
