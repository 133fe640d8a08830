"""What a DMD2 iteration costs here and in NVIDIA's FastGen, over the very same network, batch and precision.

    python benchmarks/fastgen.py --fastgen FOLDER [--alternations 5] [--iterations 20] [--out benchmarks/fastgen.md]

FOLDER is a checkout of https://github.com/NVlabs/FastGen. Both train all weights of three copies of the teacher's UNet on
latents noised to a step's level, which is the one policy that FastGen has. Each measurement is a process of its own, the
two sides by turns. Student and fake score step in separate iterations, as they do in FastGen. Of FastGen only what the
DMD2 model uses is imported; packages that it lists and that are missing here have stand-ins in this process alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fastgen_side import fastgen_side
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.distill.console import answer, quiet

PROMPTS = [f"a drawing of thing {i}" for i in range(64)]
GUIDED = 4.5
ROLES = ("student", "fake score")
CASES = {
    "no GAN, no guidance": {"gan": 0.0, "guidance": 1.0},
    "no GAN, guidance": {"gan": 0.0, "guidance": GUIDED},
    "GAN, no guidance": {"gan": 1e-3, "guidance": 1.0},
    "GAN, guidance": {"gan": 1e-3, "guidance": GUIDED},
}
SIDES = ("FastGen", "fewstep", "fewstep, own rollout")
GOALS = """Goals: a student iteration in at most 0.85 of FastGen's time with guidance and 0.95 without, a fake-score iteration in at
most 1.05 of it, at most 0.55 of the bytes kept for the student's backward where there is no GAN."""


@dataclass
class Side:
    """One side, ready: `step(i)` trains the student at even i and the fake score at odd i.

    `networks`: the modules whose calls are counted.
    """

    step: Callable[[int], Any]
    networks: list[nn.Module]


def fewstep_side(a: argparse.Namespace, teacher: Any, latents: Tensor, rollout: bool) -> Side:
    """The trainer's iteration of dmd2."""
    from accelerate import Accelerator

    from fewstep.distill.batches import Batches
    from fewstep.distill.config import validate
    from fewstep.distill.data import Prompts
    from fewstep.distill.record import Record
    from fewstep.distill.run import methods_distiller, networks_of
    from fewstep.distill.trainer import Trainer

    never = 10**9  # neither checkpoints nor previews
    config = validate(
        {
            **{
                "method": "dmd2",
                "teacher": a.teacher,
                "train_data": "in memory",
                "student": "full",
                "steps": [a.steps],
            },
            **{"policy": "backward_simulation" if rollout else "noised_data", "gan_weight": a.gan},
            "discriminator_features": "teacher",  # FastGen's
            **{"guidance_scale": a.guidance, "train_batch_size": a.batch, "mixed_precision": a.precision},
            **{"max_train_steps": never, "checkpointing_steps": never, "adam_weight_decay": 0.01},
            **{"output_dir": a.folder, "fake_score_updates": 1},
        }
    )
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=a.device == "cpu")
    record = Record(config, accelerator)
    record.open(resume=False)
    method = methods_distiller(config, networks_of(config, teacher))
    # FastGen's rhythm: one role at a time
    method.updates = lambda iteration: ["student"] if iteration % 2 == 0 else ["fake_score"]
    with torch.no_grad():
        condition = teacher.encode(PROMPTS, "")
    shape = teacher.latent_shape()
    batches = Batches(Prompts(PROMPTS), shape, condition, latents, config.seed, a.batch, device=accelerator.device)
    trainer = Trainer(config, accelerator, method, batches, record)
    return Side(trainer.step, [m for r in method.roles().values() for m in r.denoiser.networks.values()])


class Kept:
    """A tensor that autograd keeps, as `kept` counts it."""

    def __init__(self, tensor: Tensor, counts: dict[int, list[int]]):
        self.tensor, self.counts, self.key = tensor, counts, tensor.untyped_storage().data_ptr()
        counts.setdefault(self.key, [0, tensor.untyped_storage().nbytes()])[0] += 1

    def __del__(self):
        entry = self.counts[self.key]
        entry[0] -= 1
        if not entry[0]:
            del self.counts[self.key]


def kept(side: Side, i: int) -> int:
    """The most bytes that lie kept for backward at one time in iteration i, each storage once, without parameters."""
    counts: dict[int, list[int]] = {}
    most = 0
    weights = {p.untyped_storage().data_ptr() for m in side.networks for p in m.parameters()}

    def pack(tensor: Tensor) -> Any:
        nonlocal most
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor
        held = Kept(tensor, counts)
        most = max(most, sum(size for _, size in counts.values()))
        return held

    def unpack(held: Any) -> Tensor:
        return held.tensor if isinstance(held, Kept) else held

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        side.step(i)
    return most


@contextmanager
def counted(networks: list[nn.Module]) -> Iterator[dict[bool, int]]:
    """Within the block, rows through the networks, with and without gradients switched on."""
    rows = {True: 0, False: 0}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows[torch.is_grad_enabled()] += len((*args, *kwargs.values())[0])

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in networks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def resident(key: str) -> int:
    """A line of this process's memory, in bytes: `VmHWM` is the peak, `VmRSS` what is there now."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))


def measured(a: argparse.Namespace) -> dict[str, Any]:
    """Of one side in this process: milliseconds of each iteration, bytes kept, rows, and the peak of memory, by role."""
    from fewstep.distill.efficiency import keep_freed_memory
    from fewstep.samplers.load import load

    torch.manual_seed(0)
    if a.threads:
        torch.set_num_threads(a.threads)
    cuda = a.device == "cuda"
    if a.keep_both or a.side != SIDES[0]:
        keep_freed_memory(torch.device(a.device))  # as every run does
    teacher = load(a.teacher)
    teacher.to(a.device)
    latents = torch.randn(len(PROMPTS), *teacher.latent_shape())
    made = fastgen_side(a, teacher, latents, PROMPTS) if a.side == SIDES[0] else None
    side = Side(*made) if made else fewstep_side(a, teacher, latents, a.side == SIDES[2])
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    # plain attention on CPUs is a choice of kernels that either could make: both sides have it
    with nullcontext() if cuda else sdpa_kernel(SDPBackend.MATH):
        for i in range(a.warm_up):
            side.step(i)
        times: dict[str, list[float]] = {role: [] for role in ROLES}
        passed: dict[str, list[tuple[float, float]]] = {role: [] for role in ROLES}
        for i in range(a.iterations):
            with counted(side.networks) as rows:
                start = time.perf_counter()
                side.step(i)
                if cuda:
                    torch.cuda.synchronize()
                times[ROLES[i % 2]].append(1000 * (time.perf_counter() - start))
            passed[ROLES[i % 2]].append((rows[True] / a.batch, rows[False] / a.batch))
        peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
        found: dict[str, Any] = {"peak": peak, "above": peak - before}
        for i, role in enumerate(ROLES):
            graph, plain = (statistics.mean(n) for n in zip(*passed[role], strict=True))
            found[role] = {"ms": statistics.median(times[role]), "kept": kept(side, i), "graph": graph, "plain": plain}
    return found


def child(a: argparse.Namespace, side: str, case: str) -> dict[str, Any]:
    """`measured` in a process of its own."""
    values = {**vars(a), **CASES[case], "side": side, "fastgen": str(a.fastgen), "out": None}
    command = [sys.executable, __file__, "--measure", json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, {case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def page(a: argparse.Namespace, found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The table, and what it is of."""
    said = f"python benchmarks/fastgen.py --fastgen FOLDER --alternations {a.alternations} --iterations {a.iterations}"
    lines = [
        "# DMD2 beside NVIDIA's FastGen",
        "",
        f"`{said}`, FastGen at {revision(a.fastgen)}: {(__doc__ or '').split(chr(10))[0]}",
        "",
        f"The UNet of {a.teacher}, batch {a.batch}, mixed precision {a.precision}, {a.device}, "
        f"{a.threads or torch.get_num_threads()} threads, torch {torch.__version__}. Latents noised to one of {a.steps} "
        "steps on both sides; `own rollout` is backward simulation, the default here, which FastGen does not have. "
        f"Medians over {a.alternations} processes a side, by turns, of {a.iterations // 2} iterations of each role; ratios to "
        "FastGen are medians over the turns. Rows: through the networks in one iteration over the batch, with gradients switched on + without, means.",
        "",
        GOALS,
        "",
        "On a CPU every run of fewstep asks glibc to keep freed memory for the next iteration, and so does this; FastGen does not"
        + (", but here both sides have it." if a.keep_both else "; `--keep-both` gives it to both."),
        "",
        "With a GAN both discriminators read the frozen teacher's features (`discriminator_features: teacher`; the default here is "
        "DMD2's, the fake score's) with the same heads. FastGen reads the student's in the call that gives the teacher's score; "
        "here that is a call of its own, at a level and noise of its own as in DMD2's code, up to the block that is read. The loop "
        "around FastGen clips as torch does; FastGen's own clipping, which looks at each gradient for NaN, is left out.",
        "",
        "| | side | student, ms | ratio | fake score, ms | ratio | kept for the student's backward, MB | ratio | rows, student "
        "| rows, fake score | peak memory, MB | above what was loaded |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        theirs = found[SIDES[0], case]
        for side in SIDES:
            ours = found.get((side, case))
            if ours is None:
                continue

            def middle(of: Callable[[dict[str, Any]], float], runs: list[dict[str, Any]] = ours) -> float:
                return statistics.median(of(run) for run in runs)

            def ratio(
                role: str, key: str, runs: list[dict[str, Any]] = ours, base: list[dict[str, Any]] = theirs
            ) -> str:
                return f"{statistics.median(x[role][key] / y[role][key] for x, y in zip(runs, base, strict=True)):.3f}"

            student, fake = ROLES
            rows = [f"{ours[0][role]['graph']:.2g} + {ours[0][role]['plain']:.2g}" for role in ROLES]
            cells = [
                *(case, side, f"{middle(lambda r: r['student']['ms']):.1f}", ratio(student, "ms")),
                *(f"{middle(lambda r: r['fake score']['ms']):.1f}", ratio(fake, "ms")),
                *(f"{middle(lambda r: r['student']['kept']) / 1e6:.1f}", ratio(student, "kept"), *rows),
                *(f"{middle(of) / 1e6:.0f}" for of in (lambda r: r["peak"], lambda r: r["above"])),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def revision(folder: Path) -> str:
    """The commit of a checkout."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "an unknown revision"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastgen", type=Path, help="a checkout of FastGen")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20, help="of a process, half of them the student's")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--teacher", default="embedded:emoji", help="a StableDiffusionPipeline that predicts v")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--keep-both", action="store_true", help="FastGen's process keeps freed memory, too")
    parser.add_argument("--out", type=Path, help="write the page there, too, e.g. benchmarks/fastgen.md")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        with tempfile.TemporaryDirectory() as folder:
            settings: Any = SimpleNamespace(**json.loads(a.measure), folder=folder)
            print(json.dumps(measured(settings)))
        return
    if a.fastgen is None or not (a.fastgen / "fastgen/methods").is_dir():
        raise SystemExit(f"--fastgen {a.fastgen}: must be a checkout of https://github.com/NVlabs/FastGen")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(a.alternations):
        for case, settings in CASES.items():
            sides = SIDES[:2] if settings["gan"] else SIDES
            for side in sides if turn % 2 == 0 else reversed(sides):
                found.setdefault((side, case), []).append(child(a, side, case))
                times = ", ".join(f"{role} {found[side, case][-1][role]['ms']:.1f} ms" for role in ROLES)
                print(f"turn {turn + 1}, {case}, {side}: {times}", file=sys.stderr)
    said = page(a, found)
    print(said)
    if a.out:
        a.out.write_text(said, encoding="utf-8")


if __name__ == "__main__":
    quiet()
    sys.exit(answer(main))
