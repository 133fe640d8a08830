"""Every method on the embedded teacher, side by side: an equal budget each, or until evaluations bring nothing more.

    python benchmarks/methods.py --minutes 5
    python benchmarks/methods.py --minutes 45 --patience 5
    python benchmarks/methods.py --drawn benchmarks/methods-equal.json --pictures docs/images/methods

Each method is its shipped config for the emoji teacher; further KEY=VALUE are for all of them. A probe of a few
iterations says how many fit into the minutes, a run trains them with figures on the way, `fewstep evaluate` judges the
student at the step counts that it has. The teacher's rows are those of benchmarks/quickstart.json, its best of a sweep.
What is trained or judged already under --runs is taken as it is, so an interrupted benchmark goes on. The third draws
the curves of a file that was written before: for each method its distance and its losses while it trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fewstep.app.plot import COLOURS, plot
from fewstep.distill.config import load_config

HERE = Path(__file__).parent
CONFIGS = [
    *("lcm/emoji", "dmd2/emoji", "dmd2/emoji-gan", "sid/emoji", "sid_fewstep/emoji", "sid_fewstep/emoji-gan"),
    *("dmd/emoji", "sim/emoji", "swiftbrush/emoji", "tdm/emoji", "uni_instruct/emoji", "disback/emoji"),
    *("phased_dmd/emoji", "msd/emoji"),
]
FIGURE = "fd_emoji_corrected"
WATCHED = (FIGURE, "category_accuracy", "blends")
COLUMNS = (FIGURE, "clip_emoji", "category_accuracy", "coverage", "blends", "diversity")
PROBE = 12
"""Iterations of the probe; the first four are not timed."""
SHORT = {"disback/emoji": ["nodes=0", "fake_score_warmup_steps=0"]}
"""Of a probe, where a whole run would not fit into it."""
PALETTE = ("#2a6fdb", "#d1495b", "#2e8b57", "#8a5cc2", "#c77f1a", "#4b8f9f")


def plain(name: str) -> str:
    """A row's name as a folder's."""
    return name.replace("/emoji", "").replace("/", "-")


def trained(name: str, run: str, options: argparse.Namespace, *settings: str) -> Path:
    """The folder of a run, trained now or before; its peak of resident memory stands in peak.json."""
    folder = options.runs / run
    if (folder / "student" / "fewstep.json").is_file():
        return folder
    common = [f"output_dir={options.runs}", f"name={run}", "report_num=null", *settings, *options.settings]
    log = options.runs / f"{run}.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "fewstep.distill", name, *common, "--resume"]
        started = subprocess.Popen(command, stdout=out, stderr=out)
        _, status, usage = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(f"{name}: {log.read_text().strip().splitlines()[-1]}")
    (folder / "peak.json").write_text(json.dumps(usage.ru_maxrss * 1024))
    return folder


def log_of(folder: Path) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl, or of those of its parts, one after the other."""
    lines: list[dict[str, float]] = []
    for path in sorted(folder.glob("parts/*/metrics.jsonl")) or [folder / "metrics.jsonl"]:
        last = lines[-1] if lines else {"iteration": 0, "seconds": 0.0}
        for line in map(json.loads, path.read_text().splitlines()):
            lines.append(line | {k: line[k] + last[k] for k in ("iteration", "seconds")})
    return lines


def probe(name: str, options: argparse.Namespace) -> float:
    """Seconds of an iteration."""
    settings = [f"max_train_steps={PROBE}", "logging_steps=4", *SHORT.get(name, [])]
    lines = log_of(trained(name, f"{plain(name)}-probe", options, *settings))
    return (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["iteration"] - lines[0]["iteration"])


def judged(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `fewstep evaluate`."""
    report = report_of(name, options)
    if not report.is_file():
        plans = json.loads((folder / "student" / "fewstep.json").read_text())["plans"]
        steps = ",".join(sorted((str(k) for k in plans), key=int, reverse=True))
        command = [sys.executable, "-m", "fewstep.app", "evaluate", str(folder), "--steps", steps, "--num"]
        command += [str(options.num), "--prompts", "embedded:emoji", "--out", str(report), "--batch", "50"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {(done.stderr.strip().splitlines() or ['exit code'])[-1]}")
    rows = json.loads(report.read_text())["rows"]
    return [row | {"source": name} for row in rows if row["role"] == "student"]


def result(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the tables say of one method."""
    folder = options.runs / plain(name)
    lines = log_of(folder)
    curve = [
        {"iteration": line["iteration"], "seconds": line["seconds"]} | {k: line[f"eval/{k}"] for k in WATCHED}
        for line in lines
        if f"eval/{FIGURE}" in line
    ]
    paces = [
        (b["seconds"] - a["seconds"]) / (b["iteration"] - a["iteration"])
        for a, b in itertools.pairwise(lines)
        if f"eval/{FIGURE}" not in b
    ]
    losses = [
        {k: v for k, v in line.items() if k in ("iteration", "student/loss", "student/gap", "fake_score/loss")}
        for line in lines[:: max(1, len(lines) // 60)]
    ]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    peak = folder / "peak.json"
    return {
        "config": name,
        "batch": config["train_batch_size"],
        "student": config["student"],
        "guidance_scale": config.get("guidance_scale"),
        "learning_rate": config["learning_rate"],
        "iterations": lines[-1]["iteration"],
        "seconds": lines[-1]["seconds"],
        "seconds_per_iteration": statistics.median(paces),
        "peak_memory_bytes": json.loads(peak.read_text()) if peak.is_file() else None,
        "rows": judged(name, folder, options),
        "curve": curve,
        "losses": losses,
    }


def report_of(name: str, options: argparse.Namespace) -> Path:
    """Where `judged` writes, and its picture beside it."""
    return options.runs / plain(name) / f"evaluate-{options.num}.json"


def cell(row: dict[str, Any], name: str) -> str:
    """A figure with its error."""
    figure = row["metrics"].get(name)
    if figure is None:
        return "-"
    return f"{figure['value']:.3f} ± {figure['stderr']:.3f}" if figure["stderr"] else f"{figure['value']:.3f}"


def table(found: dict[str, Any], teacher: Sequence[dict[str, Any]]) -> str:
    """All rows as markdown, the teacher's first."""
    head = ["row", "steps", "NFE", *COLUMNS, "iterations", "ms / iteration", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def line(name: str, row: dict[str, Any], *cost: str) -> None:
        cells = [name, str(row["steps"] or "-"), f"{row['nfe']:g}" if row["nfe"] else "-"]
        cells += [cell(row, k) for k in COLUMNS]
        lines.append("| " + " | ".join([*cells, *(cost or ("", "", ""))]) + " |")

    for row in teacher:
        line("real" if row["role"] == "reference" else "teacher", row)
    for name, method in found.items():
        peak = method["peak_memory_bytes"]
        cost = (
            str(method["iterations"]),
            f"{1000 * method['seconds_per_iteration']:.0f}",
            f"{peak / 2**30:.1f}" if peak else "-",
        )
        for i, row in enumerate(method["rows"]):
            line(name if i == 0 else "", row, *(cost if i == 0 else ()))
    return "\n".join(lines)


def curves(found: dict[str, Any], title: str = f"{FIGURE}, fewest steps") -> str:
    """One SVG: how far every student was at every evaluation, plots of at most six lines."""
    names, parts = list(found), []
    for i in range(0, len(names), COLOURS):
        some = [n for n in names[i : i + COLOURS] if found[n]["curve"]]
        if not some:  # several students have none together
            continue
        lines = {n: [(p["seconds"], p[FIGURE], 0.0) for p in found[n]["curve"]] for n in some}
        svg = plot(title, "seconds of training", lines, {}, some)
        key = "".join(
            f'<text x="{40 + 105 * (j % 3)}" y="{226 + 15 * (j // 3)}" font-size="11" fill="{PALETTE[j]}">{n}</text>'
            for j, n in enumerate(some)
        )
        parts.append(f'<g transform="translate({350 * (i // COLOURS)} 0)">{svg}{key}</g>')
    return page(parts, 250)


def history(method: dict[str, Any]) -> str:
    """One SVG of a method: its distance at every evaluation, and what its roles logged, means of five lines of the log."""
    parts: list[str] = []
    logged = [("distance in fewest steps", method["curve"], FIGURE, 1)]
    logged += [(key, method["losses"], key, 5) for key in ("student/loss", "student/gap", "fake_score/loss")]
    for title, lines, key, width in logged:
        there = [p for p in lines if key in p]
        points = [
            (last["iteration"], statistics.fmean(p[key] for p in there[i - width + 1 : i + 1]), 0.0)
            for i, last in enumerate(there)
            if i >= width - 1
        ]
        if points:
            svg = plot(title, "iterations", {key: points}, {}, [key])
            parts.append(f'<g transform="translate({350 * len(parts)} 0)">{svg}</g>')
    return page(parts, 220)


def draw(found: dict[str, Any], folder: Path) -> None:
    """The curves of every method, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in found.items():
        (folder / f"{plain(name)}.svg").write_text(history(method))


def page(plots: Sequence[str], height: int) -> str:
    """An SVG file of plots side by side, each 350 wide."""
    colours = "".join(f"--s{i}: {c}; " for i, c in enumerate(PALETTE))
    style = f"<style>svg {{ {colours}--line: #ddd; --pale: #999; font-family: sans-serif }}</style>"
    size = f'width="{350 * len(plots)}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}<rect {size} fill="white"/>{"".join(plots)}</svg>\n'


def main() -> None:
    """Probe, train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value for every method")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="of the rows; default: all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each")
    parser.add_argument("--patience", type=int, help="end a training after so many evaluations that are no better")
    parser.add_argument("--evaluations", type=int, default=8, help="on the way")
    parser.add_argument("--eval-num", type=int, default=256, help="images of each of these")
    parser.add_argument("--num", type=int, default=2000, help="images of every row")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--teacher", type=Path, default=HERE / "quickstart.json", help="a report with its rows")
    parser.add_argument("--out", type=Path, default=HERE / "methods")
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of each method's student, and its curves")
    parser.add_argument("--drawn", type=Path, help="a .json from here: nothing is trained, its curves go to --pictures")
    options = parser.parse_args()
    if options.drawn:
        if options.pictures is None:
            parser.error("--drawn: needs --pictures, the folder to draw into")
        draw(json.loads(options.drawn.read_text()), options.pictures)
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    names = options.configs.split(",")
    for name in names:
        load_config(name, options.settings)

    def train(name: str) -> None:
        if (options.runs / plain(name) / "student" / "fewstep.json").is_file():
            return
        config = load_config(name, options.settings)
        parts = getattr(config, "parts", 1)
        n = max(10, int(60 * options.minutes / seconds[name] / parts))
        settings = [f"max_train_steps={n}"]
        if parts == 1:  # the figures of a part are not those of its siblings together
            settings += [f"eval_steps={max(1, n // options.evaluations)}"]
            settings += [f"eval_metrics=[{','.join(WATCHED)}]", f"eval_num={options.eval_num}"]
            settings += ["eval_prompts=embedded:emoji", f"best_metric=eval/{FIGURE}"]
            # what a later phase has not reached is still the teacher's: figures of a phase do not compare with the next's
            patient = options.patience and getattr(config, "policy", None) != "phases"
            settings += [f"early_stopping_patience={options.patience}"] if patient else []
        trained(name, plain(name), options, *settings)

    with ThreadPoolExecutor(options.jobs) as pool:
        todo = [n for n in names if not (options.runs / plain(n) / "student" / "fewstep.json").is_file()]
        seconds = dict(zip(todo, pool.map(lambda n: probe(n, options), todo), strict=True))
        list(pool.map(train, names))
        found = dict(zip(names, pool.map(lambda n: result(n, options), names), strict=True))
    teacher = [r for r in json.loads(options.teacher.read_text())["rows"] if r["role"] != "student"]
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".svg").write_text(curves(found))
    options.out.with_suffix(".md").write_text(text := table(found, teacher) + "\n")
    if options.pictures:
        draw(found, options.pictures)
    for name in names if options.pictures else ():
        with Image.open(report_of(name, options).with_suffix(".png")) as picture:
            picture.convert("RGB").save(options.pictures / f"{plain(name)}.jpg", quality=85)
    print(text)


if __name__ == "__main__":
    main()
