"""A report as tables: in markdown for files and logs, fitted to the window on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def label(row: dict[str, Any], name: str | None = None) -> str:
    """`student, 4 steps`, after a name of its source where one is given; a folder always has one."""
    if row["role"] == "reference":
        return "real"
    if row["role"] == "folder":
        return f"{name or Path(row['source']).name}, {row['n']} images"
    said = f"{row['role']}, {row['steps']} step{'s' if row['steps'] != 1 else ''}"
    return f"{name}, {said}" if name else said


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The labels of a table, with sources where one role has several."""
    pairs = {(row["role"], row["source"]) for row in rows}
    many = {role for role, _ in pairs if sum(r == role for r, _ in pairs) > 1}
    names = short(source for role, source in pairs if role in many)
    return [label(row, names[row["source"]] if row["role"] in many else None) for row in rows]


def short(sources: Iterable[str]) -> dict[str, str]:
    """A name for each source: the last parts of its path, as few as tell it from all others."""
    parts = {source: Path(source).parts for source in sources}
    names = {}
    for source, own in parts.items():
        others = [p for other, p in parts.items() if other != source]
        some = next((k for k in range(1, len(own)) if all(p[-k:] != own[-k:] for p in others)), len(own))
        names[source] = "/".join(own[-some:]) if some < len(own) else source
    return names


def cell(value: float | None, error: float | None) -> str:
    """`0.953 ± 0.012`, to two digits of the error."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.3f}"
    digits = min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def cells(block: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a block's table."""
    fullest = sorted(block["rows"], key=lambda row: -len(row["metrics"]))  # a teacher lacks what compares with it
    names = list(dict.fromkeys(name for row in fullest for name in row["metrics"]))
    table = [["row", "NFE", "s/image", *names]]
    for row, said in zip(block["rows"], labels(block["rows"]), strict=True):
        seconds = row["seconds_per_image"]
        figures_ = [cell(*((row["metrics"].get(n) or {}).get(k) for k in ("value", "stderr"))) for n in names]
        nfe = f"{row['nfe']:g}" if row["nfe"] else "-"
        table.append([said, nfe, "-" if seconds is None else f"{seconds:.3f}", *figures_])
    return table


def costs(block: dict[str, Any]) -> list[list[str]]:
    """Header and rows of what was measured at each batch size."""
    table = [["row", "batch", "s/image", "images/s", "peak memory"]]
    for row, said in zip(block["rows"], labels(block["rows"]), strict=True):
        for cost in row.get("cost", []):
            peak = cost["peak_memory_bytes"]
            memory = "-" if peak is None else f"{peak / 2**30:.2f} GiB"
            seconds, rate = cost["seconds_per_image"], cost["images_per_second"]
            table.append([said, str(cost["batch_size"]), f"{seconds:.3f}", f"{rate:.3g}", memory])
    return table


def heading(block: dict[str, Any]) -> str:
    """What the rows of a table have in common."""
    said = "folders of images"
    if seeds := block.get("seeds"):
        which = "of each sampled row" if any(row["role"] == "folder" for row in block["rows"]) else "a row"
        said = f"{block['n']} images {which}, prompts {block['prompts']}, seeds {seeds[0]} to {seeds[-1]}"
    if "reference" in block:
        said += f", reference {block['reference']}"
    if "reference_seeds" in block:
        seeds = (f"{seed} ({use})" for use, seed in block["reference_seeds"].items())
        said += f", real renderings from seeds {', '.join(seeds)}"
    return said


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report, aligned so that they read well as they are."""
    parts = []
    for block in [report, *report["blocks"]]:
        parts.append(f"{heading(block)}:\n\n{_aligned(cells(block))}")
        if len(cost := costs(block)) > 1:
            parts.append(f"What sampling cost, by batch size:\n\n{_aligned(cost)}")
        parts += [f"- {line}" for line in block.get("notes", [])]
    return "\n\n".join(parts) + "\n"


def _aligned(table: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in table]
    rule = "| " + " | ".join("-" * w for w in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def show(report: dict[str, Any]) -> None:
    """Print a report: on a terminal a figure a line, elsewhere the text of report.md.

    Standard errors are left out where they do not fit; report.md has them.
    """
    if not sys.stdout.isatty():
        print(markdown(report))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for block in [report, *report["blocks"]]:
        turned = list(zip(*cells(block), strict=True))
        widths = [max(len(line[i]) for line in turned[1:]) + 1 for i in range(len(turned[0]))]
        fits = sum(widths) <= console.width
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for name in turned[0][1:]:
            table.add_column(name.replace(", ", "\n"), justify="right")
        for line in turned[1:]:
            table.add_row(*(text if fits else text.partition(" ± ")[0] for text in line))
        console.print(heading(block), style="bold")
        console.print(table)
        console.print()
