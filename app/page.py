"""report.html: the table, quality against calls and seconds, the same noise through every row, best and worst prompts.

One file without scripts or anything from elsewhere: pictures and moving ones are inside it, plots are SVG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fewstep.app.plot import legend, plot
from fewstep.app.rows import Row
from fewstep.distill import checkpoint
from fewstep.distill.metric_names import METRICS, OF_PROMPTS
from fewstep.distill.picture import to_image
from fewstep.distill.table import cells, costs, heading, labels, short

COLUMNS = 8
"""Images of a row."""
SHOWN, SMALL = 128, 112
"""Pixels of their sides, and of those of the best and worst prompts."""
EXTREMES = 4
"""Best and worst prompts of a row."""
FRAMES = 16
"""At most so many frames of a clip are shown."""

LEGEND = (
    "Bold is the best of a column, unless all are alike; ± is one standard error; rows differ that are farther apart than twice "
    "the root of the sum of their errors' squares."
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --pale: #666; --line: #ddd; --paper: #fff; --s0: #4269d0; --s1: #d97706;
  --s2: #15803d; --s3: #be123c; --s4: #7c3aed; --s5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --pale: #a0a0a0; --line: #3a3a3a; --paper: #16181a;
  --s0: #7d9bff; --s1: #f5a742; --s2: #4ade80; --s3: #fb7185; --s4: #b794f6; --s5: #38bdf8; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 24px;
  max-width: 1500px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 8px; } p { margin: 4px 0 12px; color: var(--pale); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; } th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.best { font-weight: 600; } .arrow, .error { color: var(--pale); font-weight: 400; }
.plots, .pair { display: flex; flex-wrap: wrap; gap: 8px 32px; } .pair { gap: 0 4px; } svg { display: block; } svg text { fill: var(--ink); }
.grid td, .grid th { border: 0; padding: 3px; vertical-align: middle; text-align: left; }
.grid th { font-size: 12px; font-weight: 400; color: var(--pale); white-space: normal; vertical-align: bottom; }
.grid td:first-child { white-space: nowrap; padding-right: 12px; } .grid small { color: var(--pale); }
.legend { color: var(--ink); } .scroll + p { margin-top: 8px; } img { display: block; border-radius: 3px; } img.square { image-rendering: pixelated; }
details { margin: 6px 0; } summary { cursor: pointer; } .few { display: flex; flex-wrap: wrap; gap: 10px; margin: 8px 0; }
figure { margin: 0; font-size: 12px; line-height: 1.3; } figcaption { color: var(--pale); margin-top: 4px; }
"""


BY_PROMPT = (*OF_PROMPTS, "clip_emoji", "psnr_to_teacher")
"""Figures that tell worst prompts from best, the first that a report has."""


def write(path: Path, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the page of a report; `rows` are its rows with their images."""
    names = labels(report["rows"])
    parts = [f"<h1>fewstep evaluate</h1>\n<p>{escape(heading(report))}</p>", _table(report)]
    if notes := report.get("notes"):
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        said = f"{len(notes)} note{'s' if len(notes) > 1 else ''}"
        parts.append(f"<details><summary>{said} on these figures</summary><ul>{items}</ul></details>")
    parts.append(_plots(report["rows"]))
    parts.append(_grid(rows, names))
    parts.append(_extremes(rows, names))
    cost = costs(report)
    if len(cost) > 1:
        parts.append("<h2>Cost</h2>\n<p>On this machine, by batch size.</p>\n" + _plain(cost))
    if report.get("networks"):
        said = ", ".join(f"{k}: {v}" for k, v in report["networks"].items())
        parts.append(f"<p>Judged by {escape(said)}</p>")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>fewstep evaluate</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(p for p in parts if p) + "\n</body>\n</html>\n"
    )
    with checkpoint.writing(path, "name another file"):
        checkpoint.write_text(path, page)


def _table(report: dict[str, Any]) -> str:
    """The figures, the best of each column in bold; real images and folders do not compete."""
    head, *lines = cells(report)
    arrows = {"lower": "↓", "higher": "↑"}
    best = {n: _best(n, report["rows"], [line[k] for line in lines]) for k, n in enumerate(head) if k >= 3}
    title = "".join(
        f'<th title="{escape(METRICS[h].about)}">{h.replace("_", "_<wbr>")}&nbsp;<span class="arrow">{arrows[METRICS[h].better]}</span></th>'
        if h in METRICS
        else f"<th>{escape(h)}</th>"
        for h in head
    )
    body = []
    for i, line in enumerate(lines):
        cells_ = []
        for name, text in zip(head, line, strict=True):
            value, plus, error = text.partition(" ± ")
            kind = ' class="best"' if i in best.get(name, ()) else ""
            tail = f' <span class="error">{plus.strip()} {error}</span>' if plus else ""
            cells_.append(f"<td{kind}>{escape(value)}{tail}</td>")
        body.append("<tr>" + "".join(cells_) + "</tr>")
    return f'<div class="scroll"><table>\n<tr>{title}</tr>\n' + "\n".join(body) + f"\n</table></div>\n<p>{LEGEND}</p>"


def _plain(table: list[list[str]]) -> str:
    lines = ["".join(f"<{tag}>{escape(c)}</{tag}>" for c in line) for tag, line in _tagged(table)]
    return '<div class="scroll"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _tagged(table: list[list[str]]) -> list[tuple[str, list[str]]]:
    return [("td" if i else "th", line) for i, line in enumerate(table)]


def _best(name: str, rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> set[int]:
    """Numbers of the rows that are best in a figure, as it is shown, among those that were sampled; none if all are alike."""
    values = [(i, row["metrics"].get(name, {}).get("value")) for i, row in enumerate(rows) if row["nfe"]]
    known = {i: value for i, value in values if value is not None}
    if not known:
        return set()
    first = (min if METRICS[name].better == "lower" else max)(known, key=lambda i: known[i])
    value, *_ = shown[first].partition(" ± ")
    alike = {i for i in known if shown[i].partition(" ± ")[0] == value}
    return alike if len(alike) < len(known) else set()


def _plots(rows: Sequence[dict[str, Any]]) -> str:
    """Each figure against calls of the network and against seconds; a line for each source."""
    sampled = [row for row in rows if row["nfe"]]
    names = [n for n in dict.fromkeys(n for row in sampled for n in row["metrics"]) if n in METRICS]
    called = short({row["source"] for row in sampled})
    names_of = {(row["role"], row["source"]): f"{row['role']} {called[row['source']]}" for row in sampled}
    sources = list(names_of.values())
    drawn = []
    for name in names:
        levels = [(row["source"], row["metrics"][name]["value"]) for row in rows if row["role"] in ("reference", "folder")
                  and (row["metrics"].get(name) or {}).get("value") is not None]  # fmt: skip
        pair = []
        for key, axis in (("nfe", "NFE"), ("seconds_per_image", "seconds per image")):
            series: dict[str, list[tuple[float, float, float]]] = {}
            for row in sampled:
                figure = row["metrics"].get(name)
                if figure and figure["value"] is not None:
                    point = (float(row[key]), figure["value"], figure["stderr"] or 0.0)
                    series.setdefault(names_of[row["role"], row["source"]], []).append(point)
            if sum(len({x for x, _, _ in points}) for points in series.values()) > 1:
                lines = {k: sorted(set(points)) for k, points in series.items()}
                pair.append(plot(f"{name} ({METRICS[name].better} is better)", axis, lines, dict(levels), sources))
        if pair:
            drawn.append(f'<div class="pair">{"".join(pair)}</div>')
    if not drawn:
        return ""
    said = "Bars are standard errors; dashed lines are real images and folders."
    return (
        f'<h2>Quality against cost</h2>\n<p>{said}</p>\n{legend(sources)}\n<div class="plots">'
        + "\n".join(drawn)
        + "</div>"
    )


def _grid(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The first images of each sampled row."""
    shown = [(row, name) for row, name in zip(rows, names, strict=True) if row.same_noise]
    if not shown:
        return ""
    heads = "".join(f"<th>{escape(p)}</th>" for p in list(shown[0][0].prompts or [])[:COLUMNS])
    lines = []
    for row, name in shown:
        images = row.images(range(min(COLUMNS, len(row.files))))
        prompts = (row.prompts or [""] * len(images))[: len(images)]
        pictures = "".join(
            f"<td>{_picture(x, SHOWN, p, row.frames_per_second)}</td>" for x, p in zip(images, prompts, strict=True)
        )
        said = row.row["scheduler"] + (f"<br>guidance {row.row['guidance']:g}" if row.row["role"] == "teacher" else "")
        lines.append(f"<tr><td>{escape(name)}<br><small>{said}</small></td>{pictures}</tr>")
    return (
        "<h2>The same prompts and noise</h2>\n"
        f'<div class="scroll"><table class="grid">\n<tr><th></th>{heads}</tr>\n' + "\n".join(lines) + "\n</table></div>"
    )


def _extremes(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Worst and best prompts of each row, by the mean of a figure over a prompt's images."""
    figure = next((f for f in BY_PROMPT if any(row.scores.values.get(f) for row in rows)), "")
    parts = []
    for row, name in zip(rows, names, strict=True):
        scores = row.scores.values.get(figure)
        if not scores or not row.prompts:
            continue
        members: dict[str, list[int]] = {}  # not by group: a prompt may have several
        for i, prompt in enumerate(row.prompts):
            members.setdefault(prompt, []).append(i)
        means = {prompt: sum(scores[i] for i in m) / len(m) for prompt, m in members.items()}
        if len(means) < 2:
            continue
        order = sorted(means, key=lambda prompt: means[prompt])
        few = min(EXTREMES, len(order) // 2)
        halves = [("worst", order[:few]), ("best", order[::-1][:few])]
        said = "".join(
            f"<div>{what}:</div>{_figures(row, [(p, members[p][0], means[p]) for p in some])}" for what, some in halves
        )
        parts.append(f"<details{'' if parts else ' open'}><summary>{escape(name)}</summary>{said}</details>")
    if not parts:
        return ""
    return (
        f"<h2>Worst and best prompts</h2>\n<p>By {figure}, the mean over a prompt's images; the first is shown.</p>\n"
        + "\n".join(parts)
    )


def _figures(row: Row, shown: Iterable[tuple[str, int, float]]) -> str:
    """Of (prompt, number of its image, mean)."""
    found = []
    for prompt, number, mean in shown:
        picture = _picture(row.images([number])[0], SMALL, prompt, row.frames_per_second)
        said = f"<b>{mean:.2f}</b> {escape(prompt)}"
        found.append(f'<figure style="width:{SMALL}px">{picture}<figcaption>{said}</figcaption></figure>')
    return f'<div class="few">{"".join(found)}</div>'


def _picture(pixels: Tensor, side: int, about: str, frames_per_second: float) -> str:
    """An image (3, H, W) or a clip (F, 3, H, W), uint8, as an element that holds it; of a long clip every so many frames."""
    every = -(-len(pixels) // FRAMES) if pixels.ndim == 4 else 1
    image, *rest = [to_image(frame) for frame in (pixels[::every] if pixels.ndim == 4 else pixels[None])]
    width, height = (max(1, round(v * side / max(image.size))) for v in image.size)
    small = side >= max(image.size)
    fine = (2 * width, 2 * height)  # sharp on fine screens
    if not small and max(fine) < max(image.size):
        image, *rest = [frame.resize(fine, Image.Resampling.LANCZOS) for frame in (image, *rest)]
    file, kind = io.BytesIO(), "webp" if rest else "png" if small else "jpeg"
    if rest:
        milliseconds = round(1000 * every / frames_per_second)
        image.save(file, kind, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=small)
    else:
        image.save(file, kind, optimize=True, quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    square = ' class="square"' if small else ""
    return (
        f'<img{square} width="{width}" height="{height}" alt="{escape(about)}" src="data:image/{kind};base64,{data}">'
    )
