"""Gaussian roles under the real trainer: samples of many equal entries, students that are the exact ODE map, their laws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.distiller import Distiller
from fewstep.distill.networks import Networks
from fewstep.distill.run import methods_distiller
from fewstep.distill.trainer import Trainer
from fewstep.samplers.adapters import bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from fewstep.samplers.noise import EDM, Flow, NoiseProcess
from tests.closed_form import GaussianNetwork, GaussianTeacher, vp
from tests.distill.runs import config, trainer

PROCESSES: dict[str, NoiseProcess] = {
    "vp": vp(),
    "vp_sample": vp("sample"),
    "vp_v_zero_snr": vp("v_prediction", zero_terminal_snr=True),
    "flow": Flow(),
    "flow_shifted": Flow(3.0),
    "edm": EDM(sigma_max=5.0),
}


class Network(GaussianNetwork):
    """With `jump` its x0 is not the posterior mean but the exact ODE map of N(mean, std^2): m + std/v (x_t - alpha m).

    v^2 = alpha^2 std^2 + sigma^2. No corrections then.
    """

    jump = False

    def forward(self, x_t: Tensor, time: Tensor, shift: Tensor, guidance: Tensor | None = None) -> Tensor:
        if not self.jump:
            return super().forward(x_t, time, shift, guidance)
        t = self.noise.from_model_time(time).to(x_t.dtype)
        if guidance is not None and self.guided is not None:
            shift = shift * (1 + self.guided * (guidance - 1))
        mean, std = self.mean + self.gain * shift.reshape(-1, *[1] * (x_t.ndim - 1)), self.log_std.exp()
        alpha, sigma = self.noise.levels(t, x_t)
        x0 = mean + std * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()
        return self.noise.output(x0, self.noise.eps_of_x0(x0, x_t, t), t)


class Teacher(GaussianTeacher):
    """Samples (C, side, side) whose entries share the numbers of their channel: a batch is many draws in C dimensions."""

    def __init__(
        self,
        noise: NoiseProcess,
        mean: list[float],
        std: list[float],
        side: int = 8,
        knots: int = 16,
        guided: float | None = None,
    ):
        one = (len(mean), 1, 1)
        super().__init__(noise, torch.tensor(mean).reshape(one), torch.tensor(std).reshape(one), one, knots, guided)
        self.networks = {"network": Network(noise, self.mean, self.std, knots, one, guided)}
        self.side = side

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        return self._shape[0], self.side, self.side

    def with_guidance_input(self) -> Teacher:
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return Teacher(self.noise, mean, std, self.side, len(self.network.scale) - 1, guided=0.0)


def method(folder: Path, teacher: Teacher, **changes: Any) -> Any:
    """A method over full copies of a teacher; `changes` are keys of its config."""
    return methods_distiller(config(folder, student="full", **changes), Networks(teacher, "full"))


def lora(folder: Path, pipeline: Any, /, perturbed: bool = True, **changes: Any) -> Any:
    """A method over LoRA roles on a pipeline in memory, each adapter's zero half perturbed in its own way."""
    made = methods_distiller(config(folder, **changes), Networks(denoiser_of(pipeline), "lora", rank=4))
    for seed, role in enumerate(made.roles().values()):
        for key, p in role.parameters.items():
            if perturbed and "lora_B" in key:
                with torch.no_grad():
                    p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(key) + 1000 * seed))
    return made


def under_training(
    folder: Path, method: Distiller, teacher: Denoiser, prompts: list[str], x0: Tensor | None = None
) -> Trainer:
    """The trainer of a method on one prompt, or several, a sample each."""
    if x0 is None:
        x0 = torch.zeros(len(prompts), *teacher.latent_shape())
    return trainer(method.config, method, x0, teacher.encode(prompts))  # type: ignore[attr-defined]


def affine(denoiser: Any, level: float, prompt: str, guidance: float | None = None) -> tuple[Tensor, Tensor]:
    """(A, b), one of each channel, of a denoiser whose x0 prediction at a level is A x + b."""
    shape = denoiser.latent_shape()
    x = torch.stack([torch.zeros(shape), torch.ones(shape)])
    t = denoiser.noise.shift(torch.tensor(level, dtype=torch.float64))
    with torch.no_grad():
        y = denoiser.x0(x, t, denoiser.encode([prompt] * 2).with_guidance(guidance))[:, :, 0, 0].double()
    return y[1] - y[0], y[0]


def laws(method: Distiller, steps: int, prompt: str) -> list[tuple[Tensor, Tensor]]:
    """Exact mean and std, one of each channel, of the student's output at every step of its own plan.

    Nothing is sampled: affine steps and Gaussian noise keep the law Gaussian.
    """
    denoiser = method.roles()["student"].denoiser
    plan = method.plan(steps)
    mean, var, found = torch.zeros(()).double(), torch.tensor(plan.initial_scale**2).double(), []
    for step in plan.steps:
        gain, offset = affine(denoiser, step.level, prompt)
        mean, var = gain * mean + offset, gain**2 * var
        found.append((mean, var.sqrt()))
        to = denoiser.noise.shift(torch.tensor(step.to, dtype=torch.float64))
        alpha, sigma = denoiser.noise.alpha(to), denoiser.noise.sigma(to)
        mean, var = alpha * mean, alpha**2 * var + sigma**2
    return found


@dataclass(frozen=True)
class Call:
    """One call of a network: whose weights, how many rows, with a graph or not, and the noisy sample and model time.

    `stopped`: it ended at the deepest block that was asked for. `backward`: an entry for each time that a gradient came
    back through the network to its sample.
    """

    role: str
    rows: int
    graph: bool
    x_t: Tensor
    time: Tensor
    stopped: bool = False
    backward: list[None] = field(default_factory=list)


def rows_by_backward(seen: list[Call], batch: int) -> dict[bool, float]:
    """Rows through networks over the batch: False: of calls that no gradient came back through, True: else, each time."""
    return {
        False: sum(c.rows for c in seen if not c.backward) / batch,
        True: sum(c.rows * len(c.backward) for c in seen) / batch,
    }


def is_as_declared(method: Distiller, iteration: int, seen: list[Call], batch: int = 2) -> None:
    """Calls of an iteration take the rows that `forwards()` says of those that step in it."""
    rows = rows_by_backward(seen, batch)
    declared = method.forwards()[" and ".join(method.updates(iteration))]
    assert (rows[False], rows[True]) == (declared["forward"], declared["backward"])


@contextmanager
def calls(method: Distiller) -> Iterator[list[Call]]:
    """Every call of the roles' networks within the block, in order, seen by hooks on the modules themselves.

    The sample of a call with a graph is handed on as a tensor of its own, whose hook sees the gradient.
    """
    roles = method.roles()
    owners = {id(bare(n)): name for name, role in roles.items() for n in role.denoiser.networks.values()}
    modules = {id(m): m for r in roles.values() for n in r.denoiser.networks.values() for m in (bare(n),)}
    seen: list[Call] = []
    watched: list[None] = []

    def role_of(module: nn.Module) -> str:
        # of LoRA roles the active adapter says which one it is; of phases there is one for each
        active = getattr(module, "_fewstep_active", None)
        return (active or "teacher").partition("_phase_")[0] if hasattr(module, "peft_config") else owners[id(module)]

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal watched
        watched = reached = []
        x_t = args[0] if args else next(iter(kwargs.values()))
        trained = any(p.requires_grad for p in roles[role_of(module)].parameters.values())
        if not torch.is_grad_enabled() or not (x_t.requires_grad or trained):
            return args, kwargs
        x_t = x_t.view_as(x_t) if x_t.requires_grad else x_t.detach().clone().requires_grad_()
        x_t.register_hook(lambda _: reached.append(None))
        return ((x_t, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): x_t})

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        x_t, time = (*args, *kwargs.values())[:2]
        graph = torch.is_grad_enabled() and x_t.requires_grad if output is None else output.requires_grad
        seen.append(Call(role_of(module), len(x_t), graph, x_t.detach(), time.detach(), output is None, watched))

    handles = [m.register_forward_pre_hook(watch, with_kwargs=True) for m in modules.values()]
    handles += [m.register_forward_hook(note, with_kwargs=True, always_call=True) for m in modules.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
