"""DisBack (arXiv:2408.15991): score distillation against a teacher that walks back from the student.

Recording: the student stands still, the fake score learns its samples, and snapshots of it lead from the teacher, node 0,
to a model of the student, node N. Backtracking: the family's loop, whose target is node N - 1, then N - 2, and from some
iteration to the end node 0, the teacher itself: ordinary distillation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch import Tensor

from fewstep.distill.distiller import Batch, Losses, Role
from fewstep.distill.methods.distribution_matching import DistributionMatching
from fewstep.distill.networks import Networks, write
from fewstep.distill.objectives.policy import Draws
from fewstep.distill.procedures import DisBackConfig
from fewstep.distill.random import Rngs

FILE = "node_"
"""What the names of a checkpoint's groups that hold nodes begin with."""


class DisBack(DistributionMatching):
    """Nodes lie in main memory; the one that is the target is written into a frozen role."""

    config: DisBackConfig

    def __init__(self, config: DisBackConfig, networks: Networks):
        super().__init__(config, networks)
        self.moving = networks.frozen("target") if config.nodes > 1 else None
        self.path: dict[int, dict[str, Tensor]] = {}
        self.held: int | None = None

    def roles(self) -> dict[str, Role]:
        return super().roles() | ({} if self.moving is None else {"target": self.moving})

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Draws:
        self.record(iteration)
        draws = super().draw(batch, rng, iteration, roles)
        if "student" in roles:
            node = self.config.node(iteration)
            self.aim(node)
            draws.scale = self.scale_at(node, draws.scale)
        return draws

    def loss(self, role: str, batch: Batch, draws: Draws, iteration: int) -> Iterator[Losses]:
        losses = super().loss(role, batch, draws, iteration)
        recording = self.config.nodes > 0 and iteration < self.config.fake_score_warmup_steps
        return islice(losses, 1) if recording else losses  # a discriminator's loss would bend the path

    def record(self, iteration: int) -> None:
        """Keep the fake score as it is before this iteration, if a node is due; N itself is never a target."""
        for node, step in enumerate(self.config.record_steps[:-1], 1):
            if step == iteration and self.moving is not None:
                parameters = self.fake_score.parameters  # those of a discriminator are no part of a node
                self.path[node] = {k: parameters[k].detach().to("cpu", copy=True) for k in self.moving.parameters}

    def aim(self, node: int) -> None:
        """Make a node the student's target, and forget those before it; in place, as compiled graphs need it."""
        if node == 0 or self.moving is None:
            self.target = self.teacher.denoiser
        elif node != self.held:
            write(self.path[node], self.moving.parameters)
            self.target = self.moving.denoiser
        self.held = node
        self.path = {k: v for k, v in self.path.items() if k <= node}

    def scale_at(self, node: int, scale: float | Tensor | None) -> float | Tensor | None:
        """The target's guidance: at node N the fake score's own, from which any other would part it; all at the teacher.

        A network that is told the scale learned its path at the one that the student is told.
        """
        if node == 0 or self.guidance is not None:
            return scale
        scale = self.config.guidance_scale if scale is None else scale
        own = self.config.fake_guidance_scale
        return own + (scale - own) * (1 - node / self.config.nodes)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {f"{FILE}{node}": weights for node, weights in self.path.items()}

    def load_tensors(self, groups: dict[str, dict[str, Tensor]]) -> None:
        # a copy of each: what was loaded lies in the file, which is pruned while it is still used
        self.path = {
            int(name.removeprefix(FILE)): {k: v.clone() for k, v in group.items()}
            for name, group in groups.items()
            if name.startswith(FILE)
        }
        self.held = None
