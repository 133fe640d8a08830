"""The one exception that a user's mistake raises; the command line prints it as one line and exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What is wrong, where, and what would be right, in one line."""


def reason(error: BaseException) -> str:
    """The first line of what an error says that is not empty, or else its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def one_line(said: str) -> Iterator[None]:
    """Within the block any error, as diffusers, transformers, peft, safetensors and the hub each have their own, is one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind, why = type(error).__name__, reason(error)
        raise UserError(f"{said}: {kind}" + (f": {why}" if why != kind else "")) from error
