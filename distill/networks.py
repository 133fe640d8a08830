"""Where roles live: LoRA adapters on one base in memory, or copies with full weights."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fewstep.distill.distiller import Role
from fewstep.distill.sharding import is_part
from fewstep.samplers.adapters import Adapted, adapters_added, bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError, reason

if TYPE_CHECKING:
    from accelerate import Accelerator

MESSAGE = 2**25
"""Numbers in one message between processes, unless one tensor has more: 128 MiB."""


class Networks:
    """Makes the roles of one run from the teacher.

    Args:
        teacher: the pretrained denoiser; frozen here.
        kind: `lora` or `full`.
        rank: of the LoRA; alpha is equal to it unless given.
        alpha: see rank.
        target_modules: ends of layer names; default: the family's.
        seed: of the adapters' random halves.
        student: what the role `student` starts as; full weights only; default: the teacher.
        beside: what the other trained roles are; `lora` beside a full student are adapters on the teacher; default: `kind`.
    """

    def __init__(
        self,
        teacher: Denoiser,
        kind: str = "lora",
        rank: int = 64,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
        student: Denoiser | None = None,
        beside: str | None = None,
    ):
        self.base = teacher
        self.student = student or teacher
        self.kind, self.beside = kind, beside or kind
        self.rank, self.alpha = rank, alpha or rank
        self.targets = list(target_modules or teacher.lora_targets)
        self.seed = seed
        self._roles: dict[str, Role] = {}
        for network_name, network in teacher.networks.items():
            network.requires_grad_(False)
            if any(".lora_" in key for key, _ in network.named_parameters()):
                # a copy would take them along, and the base of a LoRA would not be the teacher
                raise UserError(f"teacher: its {network_name} carries LoRA adapters; fuse or unload them first")

    def teacher(self) -> Role:
        """The frozen teacher: for LoRA the base with every adapter off."""
        return Role(self._seen(None))

    def trained(self, name: str, guidance_input: bool = False, phase_ends: Sequence[float] = ()) -> Role:
        """A trainable role that starts as the teacher, or as `student` has it; with `phase_ends` a LoRA for each phase."""
        if self._is_lora(name):
            if guidance_input and not self.base.takes_guidance:
                raise UserError("a guidance input would be a new layer of the base: train a full student, not a LoRA")
            role = self._adapter(name, phase_ends)
        elif phase_ends:
            raise UserError("student: full: phases of one network are LoRAs of it; set student: lora")
        else:
            start = self.student if name == "student" else self.base
            widened = guidance_input and not start.takes_guidance
            role = self._copy(start.with_guidance_input() if widened else start)
        self._roles[name] = role
        return role

    def numbered(self, name: str) -> Role:
        """A trained role that is told the number of a step too, by the input that others are told a guidance scale by."""
        if self._is_lora(name):
            raise UserError(
                "step_conditioned: the step's number is a new input, which no adapter adds; set student: full, and no "
                "fake_score: lora"
            )
        if self.base.takes_guidance:
            raise UserError(
                "step_conditioned: the network's one further input is told its guidance scale; leave it out"
            )
        try:
            return self.trained(name, guidance_input=True)
        except UserError as error:
            raise UserError(f"step_conditioned: {error}") from error

    def frozen(self, name: str) -> Role:
        """A role that starts as the teacher and that no optimiser steps: its method writes other weights into it."""
        role = self.trained(name)
        role.frozen = True
        return role

    def average(self, of: str, decay: float) -> Role:
        """A moving average of a trained role; the trainer updates it after that role's step."""
        source = self._roles[of]
        name = f"{of}_average"
        lora = self._is_lora(of)
        role = self._adapter(name, source.denoiser.phase_ends) if lora else self._copy(source.denoiser)
        with torch.no_grad():
            for key, parameter in role.parameters.items():
                parameter.copy_(source.parameters[key])
        role.ema_of, role.ema_decay = of, decay
        self._roles[name] = role
        return role

    def _is_lora(self, name: str) -> bool:
        return (self.kind if name == "student" else self.beside) == "lora"

    def _seen(self, adapter: str | None) -> Denoiser:
        if self.beside == "full":
            return self.base
        return self.base.with_networks({n: Adapted(bare(m), adapter) for n, m in self.base.networks.items()})

    def _adapter(self, name: str, phase_ends: Sequence[float] = ()) -> Role:
        if not phase_ends:
            return Role(self._seen(name), self._added(name), adapter=name)
        names = [f"{name}_phase_{i + 1}" for i in range(len(phase_ends) + 1)]
        views = [self._seen(adapter).network for adapter in names]
        seen = self.base.phased(views, phase_ends)
        parameters = {
            f"{phase}.{key.partition('.')[2]}": p
            for phase, adapter in zip(seen.networks, names, strict=True)
            for key, p in self._added(adapter).items()
        }
        return Role(seen, parameters, adapter=names[0])

    def _added(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a new adapter of every network."""
        from peft import LoraConfig

        config = LoraConfig(r=self.rank, lora_alpha=cast(int, self.alpha), target_modules=self.targets)
        parameters: dict[str, nn.Parameter] = {}
        for network_name, network in self.base.networks.items():
            module = bare(network)
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
                torch.manual_seed(self.seed)  # one start for every role: student and fake score begin alike
                _add_adapter(module, config, name)
            for key, parameter in module.named_parameters():
                if f".{name}." in key:
                    parameter.data = parameter.data.float()
                    parameters[f"{network_name}.{key.replace(f'.{name}.', '.')}"] = parameter
            adapters_added(module)
        return parameters

    def _copy(self, of: Denoiser) -> Role:
        copies = {n: copy.deepcopy(bare(m)).float().to(self.base.device) for n, m in of.networks.items()}
        parameters = {f"{n}.{k}": p for n, m in copies.items() for k, p in m.named_parameters()}
        return Role(self.base.with_networks(copies), parameters)


def _add_adapter(module: nn.Module, config: Any, name: str) -> None:
    from peft import inject_adapter_in_model

    try:
        if hasattr(module, "add_adapter"):
            cast(Any, module).add_adapter(config, adapter_name=name)
        else:
            inject_adapter_in_model(config, module, adapter_name=name)
    except ValueError as error:  # peft's, of targets that are not there, is one
        raise UserError(f"target_modules: {type(module).__name__}: {reason(error)}") from error


def require_grad(roles: dict[str, Role], names: Sequence[str]) -> None:
    """Let exactly the parameters of the named roles receive gradients."""
    for name, role in roles.items():
        for parameter in role.parameters.values():
            parameter.requires_grad_(name in names)


def mean(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Mean over processes."""
    return cast(Tensor, accelerator.reduce(value, "mean"))


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over processes, in place; DDP's wrapper fails over a base with two adapters.

    In messages of `MESSAGE` numbers, so that no second copy of all lies beside them. A parameter that no process used (an
    expert for other levels) keeps its gradient None, as on one process.
    """
    used = mean(accelerator, torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device))
    gradients = []
    for parameter, by_any in zip(parameters, used.tolist(), strict=True):
        if by_any:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    while gradients:
        ends = [0, *itertools.accumulate(g.numel() for g in gradients)]
        n = max(1, sum(end <= MESSAGE for end in ends[1:]))
        means = mean(accelerator, torch.cat([g.reshape(-1) for g in gradients[:n]]))
        for gradient, values in zip(gradients[:n], means.split([g.numel() for g in gradients[:n]]), strict=True):
            gradient.copy_(values.view(gradient.shape))  # which keeps its layout
        gradients = gradients[n:]


@torch.no_grad()
def update_average(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    """average <- decay average + (1 - decay) parameters, in place."""
    keys = list(average)
    get_ema_multi_avg_fn(decay)([average[k] for k in keys], [parameters[k].detach() for k in keys], 0)


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor] | None) -> Iterator[None]:
    """Within the block the parameters hold other values (a moving average), in place; nothing is copied but shards."""
    if values is None:
        yield
        return
    if any(map(is_part, parameters.values())):  # gathered from where they lie
        with _copied(parameters, values):
            yield
        return
    own = {k: p.data for k, p in parameters.items()}
    try:
        for k, p in parameters.items():
            p.data = values[k]
        yield
    finally:
        for k, p in parameters.items():
            p.data = own[k]


@contextmanager
def _copied(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    own = {k: p.detach().clone() for k, p in parameters.items()}
    try:
        write(values, parameters)
        yield
    finally:
        write(own, parameters)


@torch.no_grad()
def write(values: dict[str, Tensor], into: dict[str, nn.Parameter]) -> None:
    """Copy values into parameters, in place; there must be one for each."""
    for key, parameter in into.items():
        parameter.copy_(values[key])
