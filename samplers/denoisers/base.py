"""Denoiser: one thin class per pipeline family around the pipeline's own network."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.samplers.adapters import bare
from fewstep.samplers.condition import Condition, concatenate
from fewstep.samplers.denoisers.split import Run, each_network, phases
from fewstep.samplers.denoisers.vae import images_of_latents, latents_of_images
from fewstep.samplers.errors import UserError
from fewstep.samplers.features import captured, quarters
from fewstep.samplers.forward_mode import forward_mode
from fewstep.samplers.noise import NoiseProcess
from fewstep.samplers.noise_config import from_scheduler
from fewstep.samplers.router import Router
from fewstep.samplers.rules import add_noise

PIXELS = 2**20
"""That an autoencoder sees at once: one image of 1024x1024, whose activations in float32 take some GiB."""


def rows_of(pixels: int) -> int:
    """How many images of so many pixels an autoencoder sees in one call."""
    return max(1, PIXELS // pixels)


def rows_at_once(pipeline: Any, latents: Tensor) -> int:
    """How many rows of latents (B, C, [frames,] h, w) are decoded in one call."""
    factor = getattr(pipeline, "vae_scale_factor_spatial", None) or getattr(pipeline, "vae_scale_factor", None)
    if factor is None:  # DiT's has a decoder and says nothing, models of pixels have none
        channels = getattr(getattr(getattr(pipeline, "vae", None), "config", None), "block_out_channels", [1])
        factor = 2 ** (len(channels) - 1)
    frames = latents.shape[2] * getattr(pipeline, "vae_scale_factor_temporal", 1) if latents.ndim == 5 else 1
    return rows_of(frames * factor**2 * latents.shape[-2] * latents.shape[-1])


class Denoiser(ABC):
    """A pipeline's network as a function from (x_t, t, condition) to a prediction.

    Args:
        pipeline: a diffusers pipeline, loaded; its modules are used as they are.
        networks: the modules that predict, by their names in the pipeline; default: the pipeline's own. A role of a
            distillation passes its copy, or the same module with an adapter.
        latent_shape: shape of one sample (C, ...) where the noise process depends on it (dynamic shift).
    """

    network_names: ClassVar[tuple[str, ...]] = ("transformer",)
    """Names, in the pipeline, of the modules that predict; where some are missing, the others make up `networks`."""

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that a LoRA adapts by default."""

    takes_lora: ClassVar[bool] = True
    """Whether the pipeline has `load_lora_weights`."""

    clips: ClassVar[bool] = False
    """Whether a sample is a clip, (C, frames, height, width)."""

    takes_prompts: bool = True
    """Whether prompts say anything to it; where not, `encode` only counts them."""

    router: Router | None = None
    """Of several students: which of `networks` takes a row."""

    phase_ends: tuple[float, ...] = ()
    """Levels before the shift where the next of the networks takes over, each a LoRA of the one: see `phased`."""

    agreed: Callable[[list[bool]], list[bool]] | None = None
    """Where processes share each network's weights and must call it together: which of them any process is to call."""

    examples: tuple[str, ...] = ()
    """Prompts to show on a card or a page, where not any text will do."""

    def __init__(
        self,
        pipeline: Any,
        networks: dict[str, Any] | None = None,
        latent_shape: tuple[int, ...] | None = None,
    ):
        self.pipeline = pipeline
        self.networks: dict[str, Any] = networks or {
            n: m for n in self.network_names if (m := getattr(pipeline, n, None)) is not None
        }
        self.noise = self.noise_process(latent_shape)

    @property
    def takes_guidance(self) -> bool:
        """Whether the network has a guidance input."""
        return False

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Least level, after the shift, of each of several networks but the last."""
        return ()

    @property
    def network(self) -> Any:
        """The first (often only) network."""
        return next(iter(self.networks.values()))

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.network.parameters()).device

    def with_networks(self, networks: dict[str, Any]) -> Denoiser:
        """The same denoiser around other modules of the same class."""
        other = copy.copy(self)
        other.networks = networks
        return other

    def phased(self, networks: Sequence[Any], ends: Sequence[float]) -> Denoiser:
        """The same denoiser around one network seen with several LoRAs, one for each phase of the levels.

        Args:
            networks: those of the levels above the first end, from there to the second, and so on.
            ends: levels before the shift; one on an end is the next phase's.
        """
        other = self.with_networks({f"phase_{i + 1}": network for i, network in enumerate(networks)})
        other.phase_ends = tuple(ends)
        return other

    def at(self, latent_shape: tuple[int, ...]) -> Denoiser:
        """The same denoiser with the noise process of another sample shape."""
        other = copy.copy(self)
        other.noise = self.noise_process(latent_shape)
        return other

    def noise_process(self, latent_shape: tuple[int, ...] | None) -> NoiseProcess:
        """From the pipeline's scheduler; families with a dynamic shift use the shape."""
        return from_scheduler(self.pipeline.scheduler)

    @staticmethod
    def call_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
        """What the stock pipeline's call takes for prompts, beside size, steps and guidance."""
        return {"prompt": list(prompts)}

    @abstractmethod
    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the network's forward takes of each prompt, by its own names, (B, ...): embeddings in float32 on the text
        encoder's device, or labels in int64 on the network's.
        """

    def encode(self, prompts: Sequence[str], negative: str | Sequence[str] = "") -> Condition:
        """Conditions of prompts and of one negative prompt for all, or of one for each."""
        negatives = [negative] if isinstance(negative, str) else list(negative)
        return Condition(self.embed(list(prompts)), len(prompts), self.embed_negative(negatives))

    def embed_negative(self, prompts: list[str]) -> dict[str, Tensor]:
        """The same of negative prompts, which some pipelines embed otherwise; nothing where there is no such thing."""
        return self.embed(prompts)

    @abstractmethod
    def call(self, network: Callable[..., Any], x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """One call of the network with model time (B,) or (B, frames); the raw prediction."""

    @abstractmethod
    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of one sample (C, ...) for a size in pixels; default: the pipeline's own size."""

    def to_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) or clips (B, F, 3, H, W) in 0..1 to latents, the mode of the encoder."""
        return latents_of_images(self.pipeline.vae, images)

    def to_images(self, latents: Tensor) -> Tensor:
        """Latents to images or clips, 0..1 but unclamped, differentiable."""
        return images_of_latents(self.pipeline.vae, latents)

    def add_noise(self, mean: Tensor, std: Tensor | float, random: list[torch.Generator]) -> Tensor:
        """`rules.add_noise`, the noise in the layout in which the pipeline's scheduler draws it: one seed, one sample."""
        return add_noise(mean, std, random)

    @property
    def feature_blocks(self) -> tuple[str, ...]:
        """Names, in the network, of the blocks whose features are read by default."""
        return quarters(self.network.transformer_blocks, "transformer_blocks")

    def feature(self, output: Any) -> Tensor:
        """The activations of the sample (not of its text) in what a block returns, (B, ...)."""
        return output if isinstance(output, Tensor) else output[0]

    def route(self, time: Tensor) -> dict[str, Tensor]:
        """Rows of the batch by the name of the network that takes them at model time (B,) or (B, frames)."""
        return {next(iter(self.networks)): torch.arange(len(time), device=time.device)}

    def sides(self, time: Tensor) -> dict[str, Tensor]:
        """`route`, or of phases rows by the name of each."""
        return phases(self, time) if self.phase_ends else self.route(time)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """The network's raw prediction at x_t, float32.

        Args:
            x_t: (B, ...) noisy samples.
            t: level of each row, (), (B,) or (B, frames).
            condition: B rows.
            told: another time to tell the network than `t`, same shapes.
        """
        return self._each_network(lambda *rows: [self.call(*rows)], x_t, t, condition, told)[0]

    def features(
        self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[str] = (), told: Tensor | None = None
    ) -> list[Tensor]:
        """Activations of `blocks` at x_t in the order asked, float32, with their graph; what follows is not computed.

        (B, C, height, width) of a UNet's blocks, (B, tokens, C) of a transformer's. Names are those of the network's
        `named_modules()`, such as `mid_block`; default: `feature_blocks`; UserError for one that it does not have.
        """
        blocks = blocks or self.feature_blocks

        def run(network: Any, *rows: Any) -> list[Tensor]:
            with captured(bare(network), blocks, stop=True) as outputs:
                self.call(network, *rows)
            return [self.feature(outputs[name]) for name in blocks]

        return self._each_network(run, x_t, t, condition, told)

    def predict_with_features(
        self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[str] = (), told: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What `predict` and `features` give, from one call of the network."""
        blocks = blocks or self.feature_blocks

        def run(network: Any, *rows: Any) -> list[Tensor]:
            with captured(bare(network), blocks) as outputs:
                output = self.call(network, *rows)
            return [output, *(self.feature(outputs[name]) for name in blocks)]

        output, *features = self._each_network(run, x_t, t, condition, told)
        return output, features

    def jvp(self, x_t: Tensor, t: Tensor, condition: Condition, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """`predict` and its derivative along (dx, dt), float32, by forward-mode differentiation.

        dx has the shape of x_t, dt that of t or (). Along dx = velocity, dt = 1 that is the total derivative along the
        ODE (sCM, mean velocities). The derivative of x0 follows:
        `torch.func.jvp(denoiser.noise.x0, (output, x_t, t), (d_output, dx, dt))`. Both results have a graph to the
        weights unless under `no_grad`. UserError where a network has no such derivative, see `forward_mode`.
        """
        t = self._rows(t, x_t)
        tangents = dx.to(x_t), dt.to(t).expand_as(t)
        with forward_mode([bare(network) for network in self.networks.values()]):
            return torch.func.jvp(lambda x, s: self.predict(x, s, condition), (x_t, t), tangents)[:2]

    def _each_network(
        self, run: Run, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None
    ) -> list[Tensor]:
        time = self.noise.model_time(self._rows(t if told is None else told, x_t))
        return each_network(self, run, x_t, time, condition)

    @staticmethod
    def _rows(t: Tensor, x: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x.device)
        t = t if t.dtype == torch.float64 else t.float()
        return t.expand(len(x)) if t.ndim == 0 else t

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition, told: Tensor | None = None) -> Tensor:
        """Prediction of clean data at x_t, float32."""
        return self.noise.x0(self.predict(x_t, t, condition, told), x_t, self._rows(t, x_t))

    def guided_x0(
        self, x_t: Tensor, t: Tensor, condition: Condition, scale: float | Tensor, told: Tensor | None = None
    ) -> Tensor:
        """x0_u + scale (x0_c - x0_u): classifier-free guidance, 1 = none.

        One call at scale 1 (conditional) and 0 (unconditional), otherwise one batched call of 2 B rows. A network that
        takes the scale as an input and has not been told one is told this one instead, in one call.
        """
        return self._guided(self.x0, x_t, t, condition, scale, told)

    def guided_predict(self, x_t: Tensor, t: Tensor, condition: Condition, scale: float | Tensor) -> Tensor:
        """The same of the raw prediction, of which x0 is an affine function at each level."""
        return self._guided(self.predict, x_t, t, condition, scale, None)

    def _guided(
        self,
        ask: Callable[[Tensor, Tensor, Condition, Tensor | None], Tensor],
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        scale: float | Tensor,
        told: Tensor | None,
    ) -> Tensor:
        number = isinstance(scale, int | float)
        if number and scale == 1:
            return ask(x_t, t, condition, told)
        if self.takes_guidance and condition.guidance is None:
            return ask(x_t, t, condition.with_guidance(scale), told)
        if number and scale == 0:
            return ask(x_t, t, condition.unconditional(), told)
        both = concatenate([condition.unconditional(), condition])
        twice = torch.cat([x_t, x_t])
        t = torch.cat([self._rows(t, x_t)] * 2)
        told = None if told is None else torch.cat([self._rows(told, x_t)] * 2)
        unconditional, conditional = ask(twice, t, both, told).chunk(2)
        g = torch.as_tensor(scale, device=x_t.device, dtype=conditional.dtype)
        g = g.reshape(-1, *[1] * (x_t.ndim - 1)) if g.ndim else g
        return unconditional + g * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Latents to images or clips in 0..1, clamped, on the CPU, a batch at a time; a resting decoder visits the device.

        The batch is `rows_at_once` by default.
        """
        batch_size = batch_size or rows_at_once(self.pipeline, latents)
        vae = getattr(self.pipeline, "vae", None)
        home = None if vae is None else next(vae.parameters()).device
        if vae is not None:
            vae.to(latents.device)
        images = torch.cat([self.to_images(z).clamp(0, 1).cpu() for z in latents.split(batch_size)])
        if vae is not None:
            vae.to(home)
        return images

    def to(self, device: torch.device | str) -> None:
        """Move every module of the pipeline, and the networks."""
        for component in (*self.pipeline.components.values(), *map(bare, self.networks.values())):
            if isinstance(component, torch.nn.Module):
                component.to(device)

    def rest(self, device: torch.device | str, keep: Sequence[str] = ()) -> None:
        """Move every module but the networks and those named in `keep`: training does not need them."""
        for name, component in self.pipeline.components.items():
            if isinstance(component, torch.nn.Module) and name not in (*self.network_names, *keep):
                component.to(device)

    def pixels(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of an image in pixels; default: the pipeline's own size."""
        p = self.pipeline
        factor = getattr(p, "vae_scale_factor_spatial", None) or getattr(p, "vae_scale_factor", 1)
        latent_height, latent_width = self.latent_shape(height, width)[-2:]
        return latent_height * factor, latent_width * factor

    def frames(self, frames: int | None = None) -> tuple[int, float] | None:
        """How many frames a clip has, default the pipeline's own number, and how many a second; None of images."""
        return None

    @staticmethod
    def frames_per_second(pipeline: Any) -> float:
        """Of a pipeline's clips."""
        raise NotImplementedError(f"{type(pipeline).__name__} makes images")

    def with_guidance_input(self) -> Denoiser:
        """The same denoiser around networks that also take a guidance scale and ignore it until trained."""
        raise UserError(f"{type(self.pipeline).__name__}: its network cannot be given a guidance input")


def pipeline_size(
    height: int | None, width: int | None, default: int | Sequence[int], multiple: int, factor: int = 1
) -> tuple[int, int]:
    """Height and width in pixels, checked against the family's granularity.

    Args:
        height: as asked for, or None.
        width: the same.
        default: the pipeline's own, of a square one side or both.
        multiple: of both.
        factor: pixels of a unit of `default`.
    """
    tall, wide = (default, default) if isinstance(default, int) else default
    height, width = height or tall * factor, width or wide * factor
    if height % multiple or width % multiple:
        raise UserError(f"size {height}x{width}: both must be divisible by {multiple}")
    return height, width
