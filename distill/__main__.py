"""`accelerate launch -m fewstep.distill CONFIG [key=value ...] [--resume]`: the same as `fewstep train`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from fewstep.distill.console import answer, train_command


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main() -> None:
    """Parse, train, exit."""
    usage = "python -m fewstep.distill CONFIG [key=value ...] [--resume] [--dry-run] [--debug]"
    parser = OneLine("fewstep.distill", usage, "Train a student, as `fewstep train` does.")
    parser.add_argument(
        "words",
        metavar="CONFIG",
        nargs="+",
        help="a YAML file or the name of a shipped one, then keys of the config to set",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print config, roles and cost, and train nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' warnings")
    a = parser.parse_intermixed_args()
    config, *overrides = a.words
    sys.exit(answer(lambda: train_command(config, overrides, a.resume, a.dry_run, a.debug), a.debug))


if __name__ == "__main__":
    main()
