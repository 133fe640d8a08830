"""What the trainer costs: its iteration against the same forwards, backwards and optimiser steps as a bare loop.

    python benchmarks/overhead.py [--config quickstart] [--teacher FOLDER] [--iterations 100] [key=value ...]

Both train the same roles on the same batch sizes with clipping and moving average, one iteration each in turn. The
trainer also draws per sample, logs, looks for signals and now and then at samples. That both do the same work is checked: rows
through each network, with and without graph, those samples apart. Where a method begins on pairs alone, its two kinds of
iteration are timed one after the other. Prints a table with the median over the turns; exit code 1 where a ratio is above --limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.config import TrainConfig, load_config
from fewstep.distill.console import answer, quiet
from fewstep.distill.random import Rngs
from fewstep.samplers.adapters import activate, bare

PROMPTS = [f"a drawing of thing {i}" for i in range(64)]


class Bare:
    """One iteration as a script would write it.

    Args:
        config: the run's.
        roles: networks with their parameters.
        hidden: text embeddings of PROMPTS and of the negative prompt, (64, tokens, width) and (1, tokens, width).
        latents: (64, C, H, W).
        path: states of the teacher's ODE, (64, S, C, H, W), from noise to the clean sample, where there are pairs.
        places: levels of the states between, (S - 2).
    """

    def __init__(
        self,
        config: TrainConfig,
        roles: dict[str, Any],
        hidden: Tensor,
        empty: Tensor,
        latents: Tensor,
        path: Tensor | None,
        places: list[float],
    ):
        self.path, self.places = path, [round(1000 * level) - 1 for level in places]
        self.c, self.roles, self.hidden, self.empty, self.latents = config, roles, hidden, empty, latents
        scheduler = roles["student"].denoiser.pipeline.scheduler
        self.alphas = scheduler.alphas_cumprod.sqrt()
        self.sigmas = (1 - scheduler.alphas_cumprod).sqrt()
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        self.optimizers = {
            name: torch.optim.AdamW(
                list(role.parameters.values()),
                getattr(config, f"{name}_learning_rate", None) or config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.adam_weight_decay,
            )
            for name, role in roles.items()
            if role.trained
        }
        self.average = [p.detach().clone() for p in roles["student"].parameters.values()]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents and text embeddings of a random batch."""
        rows = torch.randint(len(self.latents), (self.c.train_batch_size,))
        return self.latents[rows], self.hidden[rows]

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at indices t, (B, 1, 1, 1)."""
        return self.alphas[t][:, None, None, None], self.sigmas[t][:, None, None, None]

    def call(self, name: str, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """The raw prediction of a role."""
        role = self.roles[name]
        module = bare(role.denoiser.network)
        if role.adapter is not None or self.c.student == "lora":
            activate(module, role.adapter)
        precise = self.c.mixed_precision == "no"
        with nullcontext() if precise else torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return module(x, t, encoder_hidden_states=hidden, return_dict=False)[0].float()

    def x0(self, name: str, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """The prediction of clean data."""
        alpha, sigma = self.levels(t)
        output = self.call(name, x, t, hidden)
        return alpha * x - sigma * output if self.velocity else (x - sigma * output) / alpha

    def guided(self, x: Tensor, t: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """The teacher with guidance."""
        if scale == 1:
            return self.x0("teacher", x, t, hidden)
        both = torch.cat([self.empty.expand_as(hidden), hidden])
        empty, full = self.x0("teacher", torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return empty + scale * (full - empty)

    @torch.no_grad()
    def direction(self, x0: Tensor, x_t: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """What the two scores at x_t do to the sample x0."""
        c: Any = self.c
        fake = self.x0("fake_score", x_t, t, hidden)
        real = self.guided(x_t, t, hidden, c.guidance_scale)
        e = fake - real
        if c.divergence == "huber_kl":
            e = e / (e.square() + c.huber_c**2).sqrt()
        return e / (x0 - real).abs().mean((1, 2, 3), keepdim=True)

    def step(self, name: str, loss: Tensor) -> None:
        """Backward, clipping, optimiser, moving average."""
        loss.backward()
        optimizer, parameters = self.optimizers[name], list(self.roles[name].parameters.values())
        nn.utils.clip_grad_norm_(parameters, self.c.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if name == "student":
            torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1 - (self.c.ema_decay or 0.99))

    def require_grad(self, name: str) -> None:
        """Let one role learn."""
        for other, role in self.roles.items():
            for p in role.parameters.values():
                p.requires_grad_(other == name)

    def pretrain(self, i: int) -> None:
        x0, hidden = self.batch()
        t, eps = torch.randint(1000, (len(x0),)), torch.randn_like(x0)
        alpha, sigma = self.levels(t)
        output = self.call("student", alpha * x0 + sigma * eps, t, hidden)
        target = alpha * eps - sigma * x0 if self.velocity else eps
        self.step("student", (output - target).square().mean())

    def lcm(self, i: int) -> None:
        x0, hidden = self.batch()
        c: Any = self.c
        k = torch.randint(1, c.num_ode_steps, (len(x0),))
        t, s = (v * (1000 // c.num_ode_steps) for v in (k, k - 1))
        (alpha, sigma), (alpha_s, sigma_s) = self.levels(t), self.levels(s)
        x_t = alpha * x0 + sigma * torch.randn_like(x0)
        with torch.no_grad():
            guess = self.guided(x_t, t, hidden, c.guidance_scale)
            x_s = alpha_s * guess + sigma_s * (x_t - alpha * guess) / sigma
            target = self.x0("target" if "target" in self.roles else "student", x_s, s, hidden)
        error = self.x0("student", x_t, t, hidden) - target
        self.step("student", ((error.square() + c.huber_c**2).sqrt() - c.huber_c).mean())
        if "target" in self.roles:
            own = [p.data for p in self.roles["target"].parameters.values()]
            new = [p.detach() for p in self.roles["student"].parameters.values()]
            torch._foreach_lerp_(own, new, 1 - self.roles["target"].ema_decay)

    def dmd2(self, i: int) -> None:
        c: Any = self.c
        steps_now = i >= c.fake_score_warmup_steps and (i - c.fake_score_warmup_steps) % c.fake_score_updates == 0
        noise, hidden = self.batch()
        source = Rngs(c.seed, i, []).shared("step")  # as many steps of the rollout as the trainer takes
        count = c.steps[int(torch.randint(len(c.steps), (1,), generator=source))]
        stop = int(torch.randint(count, (1,), generator=source))
        self.require_grad("student")
        x, x0 = torch.randn_like(noise), noise
        for k in range(stop + 1):
            t = torch.full((len(x),), round(1000 * (1 - k / count)) - 1)
            with torch.set_grad_enabled(steps_now and k == stop):
                x0 = self.x0("student", x, t, hidden)
            alpha, sigma = self.levels(torch.full((len(x),), max(0, round(1000 * (1 - (k + 1) / count)) - 1)))
            if k < stop:
                x = alpha * x0 + sigma * torch.randn_like(x)
        clean = x0.detach()
        if steps_now:
            t = torch.randint(20, 980, (len(x),))
            alpha, sigma = self.levels(t)
            x_t = alpha * clean + sigma * torch.randn_like(x)
            direction = self.direction(clean, x_t, t, hidden)
            self.step("student", 0.5 * (x0 - (clean - direction)).square().mean())
        self.require_grad("fake_score")
        t, eps = torch.randint(1000, (len(x),)), torch.randn_like(x)
        alpha, sigma = self.levels(t)
        output = self.call("fake_score", alpha * clean + sigma * eps, t, hidden)
        target = alpha * eps - sigma * clean if self.velocity else eps
        self.step("fake_score", (output - target).square().mean())

    def on_pairs(self, ends: Tensor) -> Tensor:
        """Distance of a step of the student, drawn in each row, from where the teacher's ODE goes in it."""
        c: Any = self.c
        assert self.path is not None
        rows, last = torch.randint(len(self.path), (c.train_batch_size,)), len(ends) - 2
        k = torch.randint(last + 1, (len(rows),))
        states = torch.tensor([0, *(1 + self.places.index(int(e)) for e in ends[1:-1]), len(self.places) + 1])
        x_t, x_s = self.path[rows, states[k]], self.path[rows, states[k + 1]]
        (alpha, sigma), (alpha_s, sigma_s) = self.levels(ends[k]), self.levels(ends[k + 1])
        kept = sigma_s / sigma * (k < last)[:, None, None, None]
        target = (x_s - kept * x_t) / (torch.where((k < last)[:, None, None, None], alpha_s, 1) - kept * alpha)
        error = self.x0("student", x_t, ends[k], self.hidden[rows]) - target
        return c.regression_weight * ((error.square() + c.huber_c**2).sqrt() - c.huber_c).mean()

    def tdm(self, i: int) -> None:
        c: Any = self.c
        noise, hidden = self.batch()
        rows = torch.arange(len(noise))
        source = Rngs(c.seed, i, []).shared("count")  # as many steps as the trainer takes
        count = c.steps[int(torch.randint(len(c.steps), (1,), generator=source))]
        top = (c.init_level or 1) - c.below_top(count)
        ends = torch.tensor([max(0, round(1000 * top * (1 - k / count)) - 1) for k in range(count + 1)])
        self.require_grad("student")
        if i < c.regression_warmup_steps:
            self.step("student", self.on_pairs(ends))
            return

        def end(x: Tensor, x0: Tensor, k: Tensor) -> Tensor:
            (alpha, sigma), (alpha_s, sigma_s) = self.levels(ends[k]), self.levels(ends[k + 1])
            return alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma

        def noised(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            t = ends[k] - ((ends[k] - ends[k + 1]) * torch.rand(len(x))).long()
            (alpha, sigma), (alpha_s, sigma_s) = self.levels(t), self.levels(ends[k + 1])
            b = (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).sqrt()
            xi = torch.randn_like(x)
            return t, alpha / alpha_s * x + b * xi, xi, b

        states = [noise]
        with torch.no_grad():
            for step in range(count - 1):
                k = torch.full_like(rows, step)
                states.append(end(states[-1], self.x0("student", states[-1], ends[k], hidden), k))
        path = torch.stack(states)
        k = torch.randint(count, (len(noise),))
        x0 = self.x0("student", path[k, rows], ends[k], hidden)
        x_s = end(path[k, rows], x0.detach(), k)
        t, x_t, _, _ = noised(x_s, k)
        direction = self.direction(x0.detach(), x_t, t, hidden)
        loss = 0.5 * (x0 - (x0.detach() - direction)).square().mean()
        self.step("student", loss + self.on_pairs(ends) if self.path is not None else loss)
        self.require_grad("fake_score")
        t, x_t, xi, b = noised(x_s, k)
        alpha, sigma = self.levels(t)
        eps = sigma * xi / b
        target = (eps - sigma * x_t) / alpha.clamp(min=1e-3) if self.velocity else eps
        output = self.call("fake_score", x_t, t, hidden)
        self.step("fake_score", ((b / sigma) ** 2 * (output - target).square()).mean())


def prepared(config: TrainConfig) -> tuple[Callable[[int], None], Callable[[int], None], list[Counter]]:
    """The trainer's iteration, the bare one, and what each sends through its networks."""
    from accelerate import Accelerator

    from fewstep.distill.alarm import sample_alarm
    from fewstep.distill.batches import Batches
    from fewstep.distill.data import Prompts
    from fewstep.distill.objectives.levels import ends
    from fewstep.distill.pairs import make_pairs
    from fewstep.distill.record import Record
    from fewstep.distill.run import methods_distiller, networks_of
    from fewstep.distill.trainer import Trainer
    from fewstep.samplers.load import load

    c: Any = config
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=True)
    record = Record(config, accelerator)
    record.open(resume=False)
    counts, methods, counting = [Counter(), Counter()], [], [True]
    for counter in counts:
        teacher = load(config.teacher)
        method = methods_distiller(config, networks_of(config, teacher))
        for module in {
            id(m): m for r in method.roles().values() for m in map(bare, r.denoiser.networks.values())
        }.values():
            module.register_forward_pre_hook(
                lambda _, args, c=counter: c.update({torch.is_grad_enabled(): len(args[0]) * counting[0]})
            )
        methods.append(method)
    with torch.no_grad():
        condition = teacher.encode(PROMPTS, "")
    latents = torch.randn(len(PROMPTS), *teacher.latent_shape())
    shape, data = teacher.latent_shape(), Prompts(PROMPTS)
    pairs, path, places = None, None, []
    if c.regression_weight:
        pairs, places = make_pairs(c, teacher, data, condition, shape, accelerator), ends(c, teacher.noise)
        made = pairs[range(len(pairs))]
        path = torch.cat([made["z"][:, None], made["between"], made["x"][:, None]], 1)
    batches = Batches(data, shape, condition, latents, config.seed, config.train_batch_size, pairs=pairs)
    trainer = Trainer(config, accelerator, methods[0], batches, record)
    trainer.samples = sample_alarm(config, methods[0], batches, record)

    def iteration(i: int) -> None:
        with trainer.attention():
            counting[0] = False
            if trainer.samples is not None:
                trainer.samples.look(i)
            counting[0] = True
            trainer.scalars |= (said := trainer.step(i))
        trainer.iteration = i + 1
        trainer.alarm.look(i + 1, said, record.checkpoints)
        trainer._after()

    key = "encoder_hidden_states"
    loop = Bare(config, methods[1].roles(), condition.tensors[key], condition.negative[key], latents, path, places)
    loop.require_grad("student")

    def bare_iteration(i: int) -> None:
        with trainer.attention():  # plain attention on CPUs is a choice of kernels: both sides have it
            getattr(loop, config.method)(i)

    return iteration, bare_iteration, counts


def timed(iteration: Callable[[int], None], i: int) -> tuple[float, float]:
    """Milliseconds of an iteration, by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    iteration(i)
    return 1000 * (time.perf_counter() - clock), 1000 * (time.process_time() - processor)


def alternation(sides: tuple[Callable[[int], None], ...], part: range) -> list[float]:
    """Mean milliseconds of each side, by the clock and of the processor, one iteration each in turn.

    Which is first changes each time: a machine's speed moves in seconds, and each side meets all of it.
    """
    spent: list[list[tuple[float, float]]] = [[] for _ in sides]
    for i in part:
        for k in (i % 2, 1 - i % 2):
            spent[k].append(timed(sides[k], i))
    return [statistics.fmean(column) for times in spent for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="whose method, sizes and precision")
    parser.add_argument("--teacher", default="embedded:emoji")
    parser.add_argument("--iterations", type=int, default=100, help="of each side in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.05)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        never = 10**9  # neither checkpoints nor previews: both are rare, and their cost is the disk's
        fixed = [f"output_dir={folder}", f"cache_dir={folder}", f"teacher={a.teacher}", f"max_train_steps={never}"]
        config = load_config(a.config, [*fixed, f"checkpointing_steps={never}", "ema_decay=0.98", *a.overrides])
        if getattr(config, "regression_weight", 0):
            config = config.model_copy(update={"num_pairs": len(PROMPTS)})
        trainer, loop, counts = prepared(config)
        alone = getattr(config, "regression_warmup_steps", 0)
        kinds = {"pairs alone": 0, "beside the scores": alone} if alone else {"all": 0}
        found = {}
        for kind, first in kinds.items():
            for i in (first, first + 1):  # warm up
                trainer(i)
                loop(i)
            for counter in counts:
                counter.clear()
            found[kind] = rows = []
            for turn in range(a.turns):
                start = first + turn * a.iterations
                rows.append(alternation((trainer, loop), range(start, start + a.iterations)))
                said = f"trainer {rows[-1][0]:.1f} ms, bare loop {rows[-1][2]:.1f} ms"
                print(f"{kind}, turn {turn + 1}: {said}", file=sys.stderr)
            if counts[0] != counts[1]:
                raise SystemExit(f"not the same work: rows with and without graph {dict(counts[0])}, {dict(counts[1])}")
    print(
        f"{a.config} ({config.method}, {config.student}) on {a.teacher}, {torch.get_num_threads()} threads: median of"
    )
    print(f"{a.turns} turns of {a.iterations} iterations, batch {config.train_batch_size}, {config.mixed_precision}\n")
    print(
        "| iterations | trainer, ms | bare, ms | ratio | of processor time | turns |\n| --- | --- | --- | --- | --- | --- |"
    )
    worst = 0.0
    for kind, rows in found.items():
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        ratios = [row[0] / row[2] for row in rows]
        ratio, processor = statistics.median(ratios), statistics.median(row[1] / row[3] for row in rows)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"| {kind} | {medians[0]:.1f} | {medians[2]:.1f} | {ratio:.3f} | {processor:.3f} | {spread} |")
        worst = max(worst, ratio)
    sys.exit(worst > a.limit)


if __name__ == "__main__":
    quiet()
    sys.exit(answer(main))
