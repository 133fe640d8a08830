"""The contract that every method fills, and what passes through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.distill.random import Rngs
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.plan import SamplingPlan


@dataclass
class Role:
    """One network of a distillation, and everything that belongs to it.

    Attributes:
        denoiser: how it is called; for a LoRA role the shared base with this role's adapter.
        parameters: what training changes, by the names they are saved under; empty where frozen.
        modules: further modules it owns (discriminator, heads, text encoder), already counted in `parameters`.
        ema_of: the role whose moving average this one is, with `ema_decay`.
        frozen: no optimiser steps it, though it has parameters: its method writes them.
        adapter: name of its LoRA adapter on the shared base, None for full weights and for the base itself.
    """

    denoiser: Denoiser
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    ema_of: str | None = None
    ema_decay: float = 0.0
    frozen: bool = False
    adapter: str | None = None

    @property
    def trained(self) -> bool:
        """Whether an optimiser steps it."""
        return bool(self.parameters) and self.ema_of is None and not self.frozen


@dataclass
class Pairs:
    """Noises with the samples that the teacher's many steps make of them.

    Attributes:
        z: standard normal, (B, C, ...).
        x: latents where the teacher's ODE takes it, (B, C, ...).
        condition: under which.
        between: the ODE's states on the way, at levels where steps of the student end, (B, S, C, ...), or None.
    """

    z: Tensor
    x: Tensor
    condition: Condition
    between: Tensor | None = None


@dataclass
class Batch:
    """One micro-batch, B rows, on the training device.

    Attributes:
        prompts: the captions.
        shape: of one sample of latents, (C, ...).
        condition: their conditions, with the negative prompt's; None where the method encodes prompts itself.
        x0: latents of real images with these captions, (B, C, ...), or None.
        size_ids: of these images, (B, 6), as SDXL is told: original height and width, top and left of the crop, height
            and width; or None.
        pairs: as many teacher-made pairs, with conditions of their own, or None.
    """

    prompts: list[str]
    shape: tuple[int, ...]
    condition: Condition | None = None
    x0: Tensor | None = None
    size_ids: Tensor | None = None
    pairs: Pairs | None = None

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.prompts)

    @property
    def of_images(self) -> Condition | None:
        """`condition` told the sizes of these images: for what a network learns from `x0`, never of samples."""
        return None if self.condition is None else replace(self.condition, sizes=self.size_ids)


@dataclass
class Losses:
    """A scalar to differentiate, and named scalars to log (detached)."""

    total: Tensor
    scalars: dict[str, Tensor] = field(default_factory=dict)


class Distiller(ABC):
    """One distillation loop: what it trains, what it draws, and the losses of one iteration."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of `prompts`, `images`, `pairs`, `student_config`: a config that lacks one of them is refused before any weight
    loads, but for pairs, which the teacher makes."""

    @classmethod
    def needs_of(cls, config: Any) -> frozenset[str]:
        """What one config needs: `needs`, unless its keys ask for more."""
        return cls.needs

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """All networks by name; `student` is what is exported."""

    def updates(self, iteration: int) -> list[str]:
        """Roles that step in this iteration, in order."""
        return [name for name, role in self.roles().items() if role.trained]

    @abstractmethod
    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Any:
        """Once per micro-batch: noise, levels, the student's sample.

        With a graph only if the student is among `roles`, those that step now; shared by the losses that follow.
        """

    @abstractmethod
    def loss(self, role: str, batch: Batch, draws: Any, iteration: int) -> Iterator[Losses]:
        """Losses of one role; each is backpropagated before the next is built."""

    def after_step(self, role: str, iteration: int, scalars: dict[str, float]) -> None:
        """After the optimiser step of `role`; scalars are averaged over micro-batches and processes."""
        return None

    @abstractmethod
    def plan(self, steps: int) -> SamplingPlan:
        """How the student samples in this many steps; UserError for a count it was not trained for."""

    @property
    @abstractmethod
    def step_counts(self) -> tuple[int, ...]:
        """The counts that `plan` accepts."""

    @abstractmethod
    def forwards(self) -> dict[str, dict[str, float]]:
        """Expected cost of one update by role: {role: {"forward": rows / B without graph, "backward": with graph}}."""

    def state_dict(self) -> dict[str, Any]:
        """What resume needs beyond roles and optimisers: plain numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        return None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors that resume needs beyond roles and optimisers, by names that no role has."""
        return {}

    def load_tensors(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`, from all groups of a checkpoint."""
        return None
