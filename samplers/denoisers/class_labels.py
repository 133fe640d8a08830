"""Classes as prompts: the name of a label, or its number as text."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from fewstep.samplers.errors import UserError


def class_ids(prompts: Sequence[str], classes: int, labels: Mapping[str, int], null: int | None = None) -> list[int]:
    """The class of each prompt.

    Args:
        prompts: names of labels, in any case, or numbers in 0..classes - 1; "" is the null class.
        classes: how many there are, without the null class.
        labels: classes by name; a class may have several names, or none.
        null: number of the null class; None where the network has none.

    Raises:
        UserError: for what is no class, with the names that are near.
    """
    names = {name.lower(): number for name, number in labels.items()}
    return [_class_id(prompt.strip(), classes, names, null) for prompt in prompts]


def _class_id(prompt: str, classes: int, names: Mapping[str, int], null: int | None) -> int:
    if not prompt and null is not None:
        return null
    if prompt.lower() in names:
        return names[prompt.lower()]
    if prompt.isdecimal() and int(prompt) < classes:
        return int(prompt)
    near = difflib.get_close_matches(prompt.lower(), names, 3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    allowed = f"a number in 0..{classes - 1}" + (f", or a name such as {next(iter(names))}" if names else "")
    raise UserError(f"label {prompt!r}: no such class; {hint}allowed: {allowed}")


def example_labels(classes: int, labels: Mapping[str, int]) -> tuple[str, ...]:
    """Two prompts: names of the first two classes where they have one."""
    names: dict[int, str] = {}
    for name, number in labels.items():
        names.setdefault(number, name)
    return tuple(names.get(number, str(number)) for number in range(min(2, classes)))
