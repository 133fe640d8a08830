"""The loop, on accelerate: it knows no method, and methods know no optimiser, device, log or file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.distill import checkpoint, efficiency, sharding
from fewstep.distill.alarm import CollapseAlarm, SampleAlarm
from fewstep.distill.batches import Batches
from fewstep.distill.config import TrainConfig
from fewstep.distill.distiller import Distiller, Losses, Role
from fewstep.distill.eval_config import PREFIX
from fewstep.distill.interrupt import Interrupted, Signals
from fewstep.distill.networks import average_gradients, mean, require_grad, swapped, update_average
from fewstep.distill.random import generator
from fewstep.distill.record import Record
from fewstep.samplers.errors import UserError

NON_FINITE = "non-finite losses"


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
        self.sharded = config.sharding_strategy == "full_shard"
        self.batches, self.record, self.alarm = batches, record, CollapseAlarm(None)
        self.samples: SampleAlarm | None = None
        self.judge: Callable[[Any], dict[str, float]] | None = None  # of the main process
        self.roles = method.roles()
        self.iteration = self.skipped = 0
        self.best: tuple[float, int] | None = None
        self.worn_out = False
        self.scalars: dict[str, float] = {}  # the latest of each name: not every role steps in every iteration
        self.signals = Signals(speaks=accelerator.is_main_process)
        self.rates = {n: getattr(config, f"{n}_learning_rate", None) or config.learning_rate for n in self.roles}
        self.optimizers = {n: self._optimizer(n, r) for n, r in self.roles.items() if r.trained}
        self.average: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.average = {k: p.detach().clone() for k, p in self.roles["student"].parameters.items()}

    def _optimizer(self, name: str, role: Role) -> Any:
        made = efficiency.optimizer(self.config, list(role.parameters.values()), self.rates[name])
        return self.accelerator.prepare(made)

    def run(self) -> None:
        """Train to the last iteration, writing logs, previews and checkpoints."""
        iterations = range(self.iteration, self.iteration if self.worn_out else self.config.max_train_steps)
        with self.signals, self.attention(), closing(self.record.progress(iterations)) as counted:
            for i in counted:
                if self.samples is not None:
                    self._seed(i)
                    with self._autocast():
                        self.scalars |= self.samples.look(i)
                self.scalars |= (said := self.step(i))
                self.iteration = i + 1
                self.alarm.look(i + 1, said, self.record.checkpoints)
                if self._after():
                    break

    def step(self, i: int) -> dict[str, float]:
        """One iteration: every role of `updates(i)` steps once; named scalars, means over micro-batches and processes."""
        self._seed(i)
        names = self.method.updates(i)
        ready: list[Any] = [None] * self.config.gradient_accumulation_steps
        said: dict[str, float] = {}
        for name in names:
            totals = {NON_FINITE: torch.zeros((), device=self.accelerator.device)}
            for m in range(len(ready)):
                if ready[m] is None:
                    batch, rng = self.batches(i, m)
                    require_grad(self.roles, names)
                    with self._autocast():
                        ready[m] = batch, self.method.draw(batch, rng, i, names)
                require_grad(self.roles, [name])
                batch, draws = ready[m]
                for losses in self._losses(name, batch, draws, i):
                    self.accelerator.backward(losses.total / len(ready))
                    totals[NON_FINITE] += ~losses.total.detach().isfinite().all()
                    for key, value in losses.scalars.items():
                        totals[key] = totals.get(key, 0) + value.detach() / len(ready)
                if name == names[-1]:
                    ready[m] = draws = None  # frees what they hold before the next are drawn
            values = self._update(name, i, totals)
            said |= {f"{name}/{k}": v for k, v in values.items()}
        return said

    def _seed(self, i: int) -> None:
        """What draws from torch's own generator, such as dropout, is a function of the iteration too."""
        seed = generator(self.config.seed, "torch", i, self.batches.rank).initial_seed()
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def attention(self) -> AbstractContextManager[Any]:
        """On CPUs plain matrix products: differentiating torch's fused attention there takes several times longer."""
        return sdpa_kernel(SDPBackend.MATH) if self.accelerator.device.type == "cpu" else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        return efficiency.autocast(self.accelerator.mixed_precision, self.accelerator.device)

    def _losses(self, name: str, batch: Any, draws: Any, i: int) -> Iterator[Losses]:
        """The method's losses, each built under autocast and differentiated outside of it."""
        losses = iter(self.method.loss(name, batch, draws, i))
        while True:
            with self._autocast():
                value = next(losses, None)
            if value is None:
                return
            yield value

    def _update(self, name: str, i: int, totals: dict[str, Tensor]) -> dict[str, float]:
        """Step a role with the gradients that lie ready; its scalars and the norm of its gradient."""
        role, optimizer = self.roles[name], self.optimizers[name]
        parameters = list(role.parameters.values())
        if self.accelerator.num_processes > 1 and not self.sharded:  # of shards a backward pass has averaged them
            average_gradients(self.accelerator, parameters)
        for group in optimizer.param_groups:
            group["lr"] = self.rates[name] * self.config.rate(i)
        self.accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        values = self._read({**totals, "grad_norm": sharding.whole(norm)})
        if values.pop(NON_FINITE):
            self._not_finite(name, "loss", i)
        if self.accelerator.scaler is None and not math.isfinite(values["grad_norm"]):
            self._not_finite(name, "gradient", i)
        optimizer.step()
        optimizer.zero_grad()
        if self.accelerator.scaler is not None and optimizer.step_was_skipped:
            self.skipped += 1
            return values
        for other in self.roles.values():
            if other.ema_of == name:
                target = {k: p.data for k, p in other.parameters.items()}
                update_average(target, role.parameters, other.ema_decay)
        if name == "student" and self.average is not None:
            decay = min(self.config.ema_decay or 0, (i + 1) / (i + 10))  # a start that forgets the first weights
            update_average(self.average, role.parameters, decay)
        self.method.after_step(name, i, {k: v for k, v in values.items() if k in totals})
        return values

    def _read(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes as floats: one message, and one wait for the device."""
        together = torch.stack([v.float().reshape(()) for v in scalars.values()])
        return dict(zip(scalars, mean(self.accelerator, together).tolist(), strict=True))

    def _not_finite(self, name: str, what: str, i: int) -> NoReturn:
        whole, _ = checkpoint.latest(self.record.checkpoints)
        kept = f"the last good checkpoint is {whole}" if whole else "no checkpoint was written yet"
        cure = "a lower learning_rate" + (", or mixed_precision: bf16" if self.config.mixed_precision == "fp16" else "")
        raise UserError(f"iteration {i + 1}: the {what} of {name} is not finite; {kept}. Try {cure}")

    def _after(self) -> bool:
        """What follows an iteration; whether it was the last."""
        c, done = self.config, self.iteration
        judged = c.evaluates(done)
        if judged and self.judge is not None:
            with self.averaged():
                self.scalars |= self.judge(self.roles["student"].denoiser)
        value = c.new_best(self.scalars, self.best and self.best[0], judged)
        # who draws no images knows no figures
        worn = self.judge is not None and c.wears_out(done, self.best, value)
        self.worn_out = c.early_stopping_patience is not None and self._any(worn)
        if self.worn_out and self.best:
            self.record.say(
                f"ends here: {c.best_metric} was {self.best[0]:.4g} at iteration {self.best[1]}, no better since"
            )
        last = done == c.max_train_steps or self.worn_out
        if last or judged or done % c.logging_steps == 0:
            rate = c.learning_rate * c.rate(done - 1)
            extra = {"skipped": float(self.skipped)} if self.skipped else {}
            said = self.scalars if judged else {k: v for k, v in self.scalars.items() if not k.startswith(PREFIX)}
            self.record.log(done, {"learning_rate": rate, **said, **extra})
            self._metric_exists()
        due = last or done % c.checkpointing_steps == 0 or (judged and c.figure_is_best)
        stop = self._stopping()
        if due and value is not None:
            self.best = (value, done)
        if due or stop:  # once an iteration: a whole checkpoint is never written over
            self.save()
        if c.validation_steps and done % c.validation_steps == 0 and not last:
            with self.averaged():
                self.record.preview(self.method, self.roles["student"].denoiser, done)
        if stop or (due and self._stopping()):  # while it was saved, maybe
            self.accelerator.wait_for_everyone()  # a launcher ends all processes when one ends
            raise Interrupted(f"stopped at iteration {done} of {c.max_train_steps}; go on with --resume")
        return last

    def _metric_exists(self) -> None:
        """UserError as soon as every role has stepped and none logs `best_metric`."""
        metric, stepped = self.config.best_loss, {key.split("/")[0] for key in self.scalars}
        if metric is not None and metric not in self.scalars and self.optimizers.keys() <= stepped:
            raise UserError(f"best_metric {metric}: never logged; logged: {', '.join(sorted(self.scalars))}")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the student has its moving average, where there is one."""
        with swapped(self.roles["student"].parameters, self.average):
            yield

    def save(self) -> None:
        """Write a checkpoint: the main process does, from the parts of all where weights are sharded."""
        if not (self.accelerator.is_main_process or self.sharded):
            return
        tensors: dict[str, dict[str, Tensor]] = dict(self.method.tensors())
        meta: dict[str, Any] = {"optimizers": {}, "method": self.method.state_dict(), "best": self.best}
        meta |= {"scalars": self.scalars, "skipped": self.skipped, "alarm": self.alarm.state_dict()}
        meta |= {"worn_out": self.worn_out, "samples": self.samples and self.samples.seen}
        for name, role in self.roles.items():
            if role.parameters:
                tensors[name] = {k: p.data for k, p in role.parameters.items()}
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer-{name}"], meta["optimizers"][name] = checkpoint.pack_optimizer(optimizer)
        if self.average is not None:
            tensors["average"] = self.average
        if self.accelerator.scaler is not None:
            meta["scaler"] = self.accelerator.scaler.state_dict()
        if not self.accelerator.is_main_process:
            checkpoint.share(tensors)
            return
        newest = checkpoint.save(self.record.checkpoints, self.iteration, tensors, meta)
        best = self.record.checkpoints / f"step-{self.best[1]:06d}" if self.best else None
        good = (*self.alarm.keep(self.record.checkpoints), *(self.samples.keep() if self.samples else ()))
        checkpoint.prune(self.record.checkpoints, newest, self.config.checkpoints_total_limit, best, *good)

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False where there is none, and training starts anew."""
        whole, said = checkpoint.latest(self.record.checkpoints)
        for line in said:
            self.record.say(line)
        if whole is None:
            self.record.rewind(0)
            self.record.say(f"no whole checkpoint in {self.record.checkpoints}: starting at iteration 0")
            return False
        groups, meta = checkpoint.load(whole)
        for name, role in self.roles.items():
            if role.parameters:
                checkpoint.fill({k: p.data for k, p in role.parameters.items()}, groups[name], whole)
        for name, optimizer in self.optimizers.items():
            checkpoint.unpack_optimizer(optimizer, groups[f"optimizer-{name}"], meta["optimizers"][name])
        if self.average is not None:
            checkpoint.fill(self.average, groups["average"], whole)
        if self.accelerator.scaler is not None and "scaler" in meta:
            self.accelerator.scaler.load_state_dict(meta["scaler"])
        self.method.load_state_dict(meta["method"])
        self.method.load_tensors(groups)
        self.iteration, self.skipped, self.scalars = meta["iteration"], meta["skipped"], meta.get("scalars", {})
        self.best = tuple(meta["best"]) if meta["best"] else None
        self.worn_out = self.config.worn_out(meta)
        self.alarm.load_state_dict(meta.get("alarm", {}))
        if self.samples is not None:
            self.samples.seen |= meta.get("samples") or {}
        self.record.rewind(self.iteration)
        past = f", which is past max_train_steps {end}" if self.iteration > (end := self.config.max_train_steps) else ""
        self.record.say(f"resumed from {whole} at iteration {self.iteration}{past}")
        return True

    def _stopping(self) -> bool:
        """Whether a signal came to any process, so that all end after the same iteration."""
        return self._any(self.signals.came)

    def _any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return mean(self.accelerator, torch.tensor(float(flag), device=self.accelerator.device)).item() > 0
