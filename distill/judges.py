"""The networks that judge, each loaded once and only when a figure asks for it; what is missing is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.distill.metric_names import FRECHET, KEPT, MANIFOLD, METRICS, SPACES, Weights
from fewstep.metrics.features import Features
from fewstep.samplers.errors import UserError


def option(field: str) -> str:
    """A field of `Weights` as an option of the command line."""
    return f"--{field.replace('_', '-')}"


@contextmanager
def refusals(mended_by: str = "") -> Iterator[None]:
    """What the metrics refuse with ValueError is the user's to mend: as a UserError, with the option that mends it."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        hint = f" (here: {mended_by})" if mended_by else ""
        raise UserError(f"{error}{hint}".replace("\n", " ")) from error


class Judges:
    """Networks by name.

    Args:
        weights: where they come from.
        device: where they run.
        spelt: a field of the weights as the user spells it.

    Every attribute raises UserError where its weights are missing, with the command or the option that supplies them.
    """

    def __init__(self, weights: Weights, device: str = "cpu", spelt: Callable[[str], str] = option):
        if weights.manifold_space not in SPACES:
            raise UserError(f"{spelt('manifold_space')} {weights.manifold_space}: unknown; known: {', '.join(SPACES)}")
        if not weights.clip_fps > 0:
            raise UserError(f"{spelt('clip_fps')} {weights.clip_fps:g}: must be above 0")
        self.weights, self.device, self.spelt = weights, device, spelt

    @cached_property
    def inception(self) -> Any:
        from fewstep.metrics.inception import Inception

        with refusals(f"{self.spelt('inception_weights')} FILE"):
            return Inception(weights=self.weights.inception_weights, device=self.device)

    @cached_property
    def clip(self) -> Any:
        from fewstep.metrics.clip import Clip

        with refusals(f"{self.spelt('clip_model')}, {self.spelt('clip_weights')}"):
            return Clip(self.weights.clip_model, self.weights.clip_weights, self.device)

    @cached_property
    def dino(self) -> Any:
        from fewstep.metrics.dino import Dino

        with refusals(f"{self.spelt('dino_model')} FOLDER"):
            return Dino(self.weights.dino_model, self.device)

    @cached_property
    def lpips(self) -> Any:
        from fewstep.metrics.lpips import Lpips

        net: Any = self.weights.lpips_net
        with refusals(f"{self.spelt('lpips_weights')} FILE"):
            return Lpips(net, self.weights.lpips_weights, self.device)

    @cached_property
    def aesthetic(self) -> Any:
        from fewstep.metrics.aesthetic import load_head

        with refusals(f"{self.spelt('aesthetic_weights')} FILE"):
            return load_head(self.weights.aesthetic_weights, self.device)

    @cached_property
    def i3d(self) -> Any:
        from fewstep.metrics.video import I3D

        with refusals(f"{self.spelt('i3d_weights')} FILE"):
            return I3D(self.weights.i3d_weights, self.device)

    @cached_property
    def raft(self) -> Any:
        from fewstep.metrics.video import Raft

        with refusals(f"{self.spelt('raft_weights')} FILE"):
            return Raft(self.weights.raft_weights, device=self.device)

    @cached_property
    def hps(self) -> Callable[[Tensor, Sequence[str]], Tensor]:
        from fewstep.metrics.aesthetic import HPS, hps, installed, load_hps

        with refusals():
            installed("hpsv2.img_score", "hpsv2", "hps")
        if (file := self.weights.hps_weights) is not None and not Path(file).is_file():
            raise UserError(f"hps: no file {file}; run: {HPS} (here: {self.spelt('hps_weights')} FILE)")
        with refusals():
            scorer = load_hps(file)
        return lambda images, prompts: hps(images, prompts, scorer)

    @cached_property
    def image_reward(self) -> Callable[[Tensor, Sequence[str]], Tensor]:
        from fewstep.metrics.aesthetic import image_reward, load_reward

        with refusals():
            model = load_reward()
        return lambda images, prompts: image_reward(images, prompts, model)

    def load(self, names: Sequence[str]) -> None:
        """Load what the figures need, so that missing weights are refused before anything is sampled."""
        for name in names:
            network = METRICS[name].network
            if network == MANIFOLD:
                network = self.weights.manifold_space
            if network:
                getattr(self, network)
            if network == "aesthetic":
                getattr(self, "clip")  # noqa: B009  it reads CLIP's features

    def names(self) -> dict[str, str]:
        """Of the networks that are loaded: weights, layer and resize."""
        loaded = ((k, getattr(v, "name", "")) for k, v in vars(self).items())
        return {k: name for k, name in loaded if isinstance(name, str) and name}

    def space(self, name: str) -> Features:
        """A feature space of images."""
        return getattr(self, "inception" if name == "frames" else name)

    def frechet_spaces(self, names: Sequence[str]) -> list[str]:
        """Spaces whose moments the figures need."""
        return list(dict.fromkeys(FRECHET[n] for n in names if n in FRECHET))

    def kept_spaces(self, names: Sequence[str]) -> list[str]:
        """Spaces of which the figures need every image's features."""
        spaces = [self.weights.manifold_space if METRICS[n].network == MANIFOLD else KEPT.get(n) for n in names]
        return list(dict.fromkeys(s for s in spaces if s))
