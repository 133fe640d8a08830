"""What `fewstep train` and `accelerate launch -m fewstep.distill` share: one command, one way to say what went wrong.

Imports no torch, so that a refused config is answered at once.
"""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from errno import EACCES, ELOOP, ENAMETOOLONG, EPERM
from itertools import zip_longest
from typing import Any

EXPECTED = {
    "fewstep.distill.config": ("ConfigError", 2),
    "fewstep.samplers.errors": ("UserError", 2),
    "fewstep.distill.trainer": ("Interrupted", 130),
    "torch": ("OutOfMemoryError", 2),  # whose message is one line
}
"""Module, exception and exit code of what a user can cause."""

TOLD_BY_TEXT = ("DefaultCPUAllocator: ", "Connection closed by peer", "Connection reset by peer")
"""What torch says in a RuntimeError of no kind of its own: main memory does not hold that much, another process ended."""


def answer(action: Callable[[], Any], debug: bool = False) -> int:
    """Run a command; its exit code. What the user caused is one line per mistake on stderr, with `debug` a traceback too.

    A group of processes that the command made ends with it: a thread of gloo's that lets go of a tensor while Python ends
    aborts the process, and a launcher takes a whole run for a failed one.
    """
    outside = _grouped()
    code = _run(action, debug)
    if not outside and _grouped():
        sys.modules["torch.distributed"].destroy_process_group()
    return code


def _grouped() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _run(action: Callable[[], Any], debug: bool) -> int:
    try:
        action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = expected(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        said = str(error)
        if isinstance(error, RuntimeError) and (found := [said.find(t) for t in TOLD_BY_TEXT if t in said]):
            said = said[found[0] :].partition("\n")[0]
        if isinstance(error, OSError) and error.filename is not None:  # no permission, a name that is too long
            said = f"{str(error.filename)[:200]}: {error.strerror}"
        for line in said.splitlines() or [type(error).__name__]:
            print(line, file=sys.stderr)
        return code
    return 0


def expected(error: Exception) -> int | None:
    """Exit code of an error that a user can cause, of the file system's refusals too; None for a bug."""
    if (
        isinstance(error, OSError)
        and error.filename is not None
        and error.errno in (EACCES, EPERM, ENAMETOOLONG, ELOOP)
    ):
        return 2
    if isinstance(error, RuntimeError) and any(text in str(error) for text in TOLD_BY_TEXT):
        return 2
    for module, (name, code) in EXPECTED.items():
        kind = getattr(sys.modules.get(module), name, None)  # what was never imported was never raised
        if kind is not None and isinstance(error, kind):
            return code
    return None


def quiet() -> None:
    """Silence the libraries' warnings, and their progress bars but those of downloads."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import fewstep.samplers  # noqa: F401  before diffusers: see fewstep.samplers.compat

    import diffusers.utils.logging as of_diffusers  # isort: skip
    import huggingface_hub.utils as of_hub
    import transformers.utils.logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()  # and, beside its own, the hub's
    of_hub.enable_progress_bars()


def train_command(
    config: str, overrides: Sequence[str] = (), resume: bool = False, dry_run: bool = False, debug: bool = False
) -> None:
    """`train`: the run, then on the main process its table and where things are."""
    from fewstep.distill.config import load_config

    checked = load_config(config, overrides)
    if not debug:
        quiet()
    if dry_run:
        print(dry(checked))
        return
    from accelerate import PartialState

    from fewstep.distill.run import train

    folder = train(checked, resume)
    if not PartialState().is_main_process:
        return
    if checked.report_num is not None:
        import json

        from fewstep.distill.report import PICTURE
        from fewstep.distill.table import show

        show(json.loads((folder / "report.json").read_text()))
        print(f"picture  {folder / PICTURE}")
    print(f"student  {folder / 'student'}")


def plan_command(
    config: str, overrides: Sequence[str] = (), memory: str | None = None, devices: int = 8, debug: bool = False
) -> None:
    """`train --plan`: what the run and its alternatives need in memory."""
    from fewstep.distill.config import load_config

    checked = load_config(config, overrides)
    if not debug:
        quiet()
    from fewstep.distill.planner import plan

    print(plan(checked, memory, devices))


def dry(config: Any) -> str:
    """The resolved config, the roles and the cost of an iteration, without training or writing anything."""
    import yaml

    from fewstep.distill import report
    from fewstep.distill.run import methods_distiller, networks_of, refuse, refuse_backbone
    from fewstep.samplers.load import load

    refuse(config)
    teacher = load(config.teacher, config.revision, config.variant)
    refuse_backbone(config, type(teacher), teacher.networks)
    method = methods_distiller(config, networks_of(config, teacher))
    report.check(config, method.step_counts, teacher)
    roles = [["role", "weights", "trained parameters"]]
    for name, role in method.roles().items():
        count = sum(p.numel() for p in role.parameters.values())
        what = "LoRA on the shared base" if role.adapter else "a copy" if role.parameters else "the teacher's"
        average = f"moving average of {role.ema_of}" if role.ema_of else ""
        roles.append([name, what, average or (f"{count:,}" if role.trained else "none: frozen")])
    cost = [["an iteration that updates", "forwards", "backwards"]]
    for name, calls in method.forwards().items():
        cost.append([name, f"{calls['forward'] + calls['backward']:g}", f"{calls['backward']:g}"])
    counts = ", ".join(map(str, method.step_counts))
    return "\n\n".join(
        [
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).strip(),
            columns(roles),
            columns(cost) + "\n(rows through a network, divided by the batch size)",
            f"the student samples in {counts} steps; the run would be written to {config.run_dir}",
        ]
    )


WIDTH = 100
"""Characters of a line of a table."""


def columns(table: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A table as aligned text; with a width its widest cells are folded between words until its lines fit."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    least = [max(len(word) for line in table for word in line[i].split() or [""]) for i in range(len(widths))]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        over = [w if w > m else 0 for w, m in zip(widths, least, strict=True)]
        if not any(over):
            break
        widths[over.index(max(over))] -= 1
    lines = []
    for row in table:
        folded = [textwrap.wrap(c, w) if c else [""] for c, w in zip(row, widths, strict=True)]
        lines += zip_longest(*folded, fillvalue="")
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def blocks(table: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """A table as several that fit, side by side, each with the first column; lines are as long as `columns` makes them."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    taken: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if sum(widths[j] + 2 for j in taken[-1]) + widths[i] > width and len(taken[-1]) > 1:
            taken.append([0])
        taken[-1].append(i)
    return [[[line[i] for i in some] for line in table] for some in taken]


def paragraph(line: str, width: int) -> str:
    """A long line folded between words."""
    return "\n".join(textwrap.wrap(line, width, subsequent_indent="   "))
