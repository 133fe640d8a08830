"""The loop, on accelerate: it knows no method, and methods know no optimiser, device, log or file."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fewstep.distill import checkpoint
from fewstep.distill.batches import Batches
from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Distiller, Losses, Role
from fewstep.distill.networks import require_grad, swapped, update_average
from fewstep.distill.record import Record
from fewstep.samplers.errors import UserError


class Interrupted(Exception):
    """A signal ended the run after a whole iteration; a checkpoint was written."""


def learning_rate(config: TrainConfig, base: float, iteration: int) -> float:
    """Rate of an iteration: a pure function, so that resume needs no scheduler state."""
    warm = min(1.0, (iteration + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    done = iteration / config.max_train_steps
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return base * warm * shape[config.lr_scheduler]


class Trainer:
    """Runs a Distiller.

    Args:
        config: the run's.
        accelerator: devices, processes, precision.
        method: what is trained, and its losses.
        batches: the micro-batches of this process.
        record: where the run is written.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, method: Distiller, batches: Batches, record: Record
    ):
        self.config, self.accelerator, self.method = config, accelerator, method
        self.batches, self.record = batches, record
        self.roles = method.roles()
        self.iteration = 0
        self.skipped = 0
        self.best: tuple[float, int] | None = None
        self._signal: int | None = None
        self.rates = {n: getattr(config, f"{n}_learning_rate", None) or config.learning_rate for n in self.roles}
        self.optimizers = {n: self._optimizer(n, r) for n, r in self.roles.items() if r.trained}
        self.average: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.average = {k: p.detach().clone() for k, p in self.roles["student"].parameters.items()}

    def _optimizer(self, name: str, role: Role) -> Any:
        c = self.config
        optimizer = torch.optim.AdamW(
            list(role.parameters.values()),
            self.rates[name],
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.adam_weight_decay,
        )
        return self.accelerator.prepare(optimizer)

    def run(self) -> None:
        """Train to the last iteration, writing logs, previews and checkpoints."""
        with self._signals():
            for i in self.record.progress(range(self.iteration, self.config.max_train_steps)):
                scalars = self.step(i)
                self.iteration = i + 1
                self._after(scalars)
        self.save()

    def step(self, i: int) -> dict[str, float | Tensor]:
        """One iteration: every role of `updates(i)` steps once; named scalars, averaged over micro-batches."""
        names = self.method.updates(i)
        ready: list[Any] = [None] * self.config.gradient_accumulation_steps
        said: dict[str, float | Tensor] = {}
        for name in names:
            totals: dict[str, Tensor] = {}
            for m in range(len(ready)):
                if ready[m] is None:
                    batch, rng = self.batches(i, m)
                    require_grad(self.roles, names)
                    with self.accelerator.autocast():
                        ready[m] = batch, self.method.draw(batch, rng, i, names)
                require_grad(self.roles, [name])
                for losses in self._losses(name, *ready[m], i):
                    self._finite(losses.total, name, "loss")
                    self.accelerator.backward(losses.total / len(ready))
                    for key, value in losses.scalars.items():
                        totals[key] = totals.get(key, 0) + value.detach() / len(ready)
            said[f"{name}/grad_norm"] = self._update(name, i)
            said |= {f"{name}/{k}": v for k, v in totals.items()}
            self.method.after_step(name, i, {k: float(self.accelerator.reduce(v, "mean")) for k, v in totals.items()})
        return said

    def _losses(self, name: str, batch: Any, draws: Any, i: int) -> Iterator[Losses]:
        """The method's losses, each built under autocast and differentiated outside of it."""
        losses = iter(self.method.loss(name, batch, draws, i))
        while True:
            with self.accelerator.autocast():
                value = next(losses, None)
            if value is None:
                return
            yield value

    def _update(self, name: str, i: int) -> Tensor:
        role, optimizer = self.roles[name], self.optimizers[name]
        parameters = list(role.parameters.values())
        if self.accelerator.num_processes > 1:
            average_gradients(self.accelerator, parameters)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.rates[name], i)
        self.accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        scaled = self.accelerator.scaler is not None
        if not scaled:
            self._finite(norm, name, "gradient")
        optimizer.step()
        optimizer.zero_grad()
        if scaled and optimizer.step_was_skipped:
            self.skipped += 1
            return norm
        for other in self.roles.values():
            if other.ema_of == name:
                target = {k: p.data for k, p in other.parameters.items()}
                update_average(target, role.parameters, other.ema_decay)
        if name == "student" and self.average is not None:
            decay = min(self.config.ema_decay or 0, (i + 1) / (i + 10))  # a start that forgets the first weights
            update_average(self.average, role.parameters, decay)
        return norm

    def _finite(self, value: Tensor, name: str, what: str) -> None:
        if not torch.isfinite(value.detach()).all():
            whole, _ = checkpoint.latest(self.record.checkpoints)
            kept = f"the last good checkpoint is {whole}" if whole else "no checkpoint was written yet"
            raise UserError(
                f"iteration {self.iteration}: the {what} of {name} is not finite; {kept}. "
                "Try a lower learning_rate, or mixed_precision: bf16 instead of fp16"
            )

    def _after(self, scalars: dict[str, float | Tensor]) -> None:
        c, done = self.config, self.iteration
        if done % c.logging_steps == 0 or done == c.max_train_steps:
            values = {k: float(v) for k, v in scalars.items()}
            rate = learning_rate(c, c.learning_rate, done - 1)
            extra = {"skipped": self.skipped} if self.skipped else {}
            self.record.log(done, {"learning_rate": rate, **values, **extra})
            self._keep_best(values)
        stop = self._signal is not None
        if (done % c.checkpointing_steps == 0 or stop) and done < c.max_train_steps:
            self.save()
        if c.validation_steps and done % c.validation_steps == 0:
            with self.averaged():
                self.record.preview(self.method, self.roles["student"].denoiser, done)
        if stop and done < c.max_train_steps:
            raise Interrupted(f"stopped at iteration {done} of {c.max_train_steps}; go on with --resume")

    def _keep_best(self, values: dict[str, float]) -> None:
        metric = self.config.best_metric
        if metric is None:
            return
        if metric not in values:
            if self.iteration == self.config.max_train_steps:
                raise UserError(f"best_metric {metric} was never logged; logged: {', '.join(sorted(values))}")
            return
        if self.best is None or values[metric] < self.best[0]:
            self.best = (values[metric], self.iteration)
            self.save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the student has its moving average, where there is one."""
        with swapped(self.roles["student"].parameters, self.average):
            yield

    def save(self) -> None:
        """Write a checkpoint (main process only)."""
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, dict[str, Tensor]] = {}
        meta: dict[str, Any] = {"optimizers": {}, "method": self.method.state_dict(), "best": self.best}
        for name, role in self.roles.items():
            if role.parameters:
                tensors[name] = {k: p.data for k, p in role.parameters.items()}
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer-{name}"], meta["optimizers"][name] = checkpoint.pack_optimizer(optimizer)
        if self.average is not None:
            tensors["average"] = self.average
        if self.accelerator.scaler is not None:
            meta["scaler"] = self.accelerator.scaler.state_dict()
        meta["skipped"] = self.skipped
        checkpoint.save(self.record.checkpoints, self.iteration, tensors, meta)
        best = self.record.checkpoints / f"step-{self.best[1]:06d}" if self.best else None
        checkpoint.prune(self.record.checkpoints, self.config.checkpoints_total_limit, best)

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False where there is none."""
        whole, said = checkpoint.latest(self.record.checkpoints)
        for line in said:
            self.record.say(line)
        if whole is None:
            return False
        groups, meta = checkpoint.load(whole)
        for name, role in self.roles.items():
            if role.parameters:
                _fill({k: p.data for k, p in role.parameters.items()}, groups[name], whole)
        for name, optimizer in self.optimizers.items():
            checkpoint.unpack_optimizer(optimizer, groups[f"optimizer-{name}"], meta["optimizers"][name])
        if self.average is not None:
            _fill(self.average, groups["average"], whole)
        if self.accelerator.scaler is not None and "scaler" in meta:
            self.accelerator.scaler.load_state_dict(meta["scaler"])
        self.method.load_state_dict(meta["method"])
        self.iteration, self.skipped = meta["iteration"], meta["skipped"]
        self.best = tuple(meta["best"]) if meta["best"] else None
        self.record.rewind(self.iteration)
        self.record.say(f"resumed from {whole} at iteration {self.iteration}")
        return True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current iteration; a second one ends it at once."""

        def handle(number: int, _: object) -> None:
            self._signal = number
            signal.signal(number, previous[number])

        try:
            previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller owns the signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _fill(into: dict[str, Tensor], values: dict[str, Tensor], where: Path) -> None:
    if into.keys() != values.keys():
        raise UserError(f"checkpoint {where}: made by another config; start anew under another name=")
    for key, value in into.items():
        value.copy_(values[key])


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over processes, one message; DDP's wrapper fails over a base with two adapters."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    flat = accelerator.reduce(flat, "mean")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.reshape(gradient.shape))
