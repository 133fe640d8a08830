"""LoRAs of random weights in the keys in which students of few steps were published."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.samplers.original import unet_key, wan_key

RANK, ALPHA = 4, 2.0
UNET = "to_q|to_k|to_v|to_out.0|proj_in|proj_out|ff.net.0.proj|ff.net.2|conv1|conv2|conv_shortcut|conv|time_emb_proj"
"""Ends of the layers that LCM-LoRA of SDXL adapts, convolutions of resnets and of the changes of size among them."""

Layers = dict[str, tuple[Tensor, Tensor]]
"""Down (rank, in, ...) and up (out, rank, ...) by the name of their layer in diffusers."""

FLUX_JOINT = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
FLUX = {
    **{"attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj", "norm1.linear": "img_mod_lin"},
    **{"norm1_context.linear": "txt_mod_lin", "ff.net.0.proj": "img_mlp_0", "ff.net.2": "img_mlp_2"},
    **{"ff_context.net.0.proj": "txt_mlp_0", "ff_context.net.2": "txt_mlp_2"},
}
FLUX_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation_lin"}


def layers(module: nn.Module, ends: str, seed: int = 2) -> Layers:
    """Random ones of the layers whose names end as said; q, k and v of one attention share what comes down."""
    generator = torch.Generator().manual_seed(seed)
    found, shared = {}, {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not re.search(rf"(^|\.)({ends})$", name):
            continue
        out, into, *kernel = layer.weight.shape
        place = re.sub(r"to_[kv]$", "to_q", re.sub(r"add_[kv]_proj$", "add_q_proj", name))
        place = place if "attn2" not in name else name  # whose keys are the text's, of another width
        if place not in shared:
            shared[place] = torch.randn(RANK, into, *kernel, generator=generator) / layer.weight[0].numel() ** 0.5
        found[name] = shared[place], 0.3 * torch.randn(out, RANK, *[1 for _ in kernel], generator=generator)
    return found


def product(down: Tensor, up: Tensor) -> Tensor:
    """What a layer's weight gains, before alpha / rank."""
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def kohya(found: Layers, prefix: str, name: Callable[[str], str] = str, alpha: float | None = ALPHA) -> dict[str, Any]:
    """`PREFIX_layer_with_underscores.lora_down.weight`, and alpha beside it."""
    state: dict[str, Tensor] = {}
    for layer, (down, up) in found.items():
        key = f"{prefix}_{name(layer).replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def peft(found: Layers, prefix: str) -> dict[str, Tensor]:
    """diffusers' own since 0.22: `PREFIX.layer.lora_A.weight`."""
    return {
        f"{prefix}.{layer}.lora_{part}.weight": value
        for layer, pair in found.items()
        for part, value in zip("AB", pair, strict=True)
    }


def processors(found: Layers, prefix: str) -> dict[str, Tensor]:
    """diffusers' own before: `attn1.processor.to_q_lora.down.weight`, and `.lora.down.weight` outside of attention."""
    state = {}
    for layer, pair in found.items():
        inner = re.sub(r"\.(attn\d)\.(to_\w+)(\.0)?$", r".\1.processor.\2_lora", layer)
        inner = inner if inner != layer else f"{layer}.lora"
        state |= {f"{prefix}.{inner}.{part}.weight": value for part, value in zip(("down", "up"), pair, strict=True)}
    return state


def stability(unet: Any) -> Callable[[str], str]:
    """Names of a UNet's layers in the code of its authors, which kohya's trainer keeps for SDXL."""
    attends = ["Cross" in name for name in unet.config.up_block_types]
    return lambda layer: unet_key(layer, unet.config.layers_per_block, attends)


def clip(encoder: nn.Module) -> Layers:
    """Of a text encoder, by the names that it had in transformers 4."""
    found = layers(encoder, "q_proj|k_proj|v_proj|out_proj|fc1|fc2", seed=3)
    return {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in found.items()}


def joint(found: Layers, block: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Of three projections in one matrix, as the authors of FLUX have them."""
    pairs = [found[f"{block}.attn.{n}"] for n in names]
    return pairs[0][0], torch.cat([up for _, up in pairs])


def flux_kohya(found: Layers) -> dict[str, Any]:
    """`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, with alpha.

    Single blocks without their `linear1`: diffusers takes it apart at the widths of the published model only.
    """
    old: Layers = {}
    for layer, pair in found.items():
        kind, i, inner = re.match(r"(\w+)\.(\d+)\.(.*)", layer).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if kind == "single_transformer_blocks":
            old[f"single_blocks.{i}.{FLUX_SINGLE[inner]}"] = pair
        elif inner in FLUX:
            old[f"double_blocks.{i}.{FLUX[inner]}"] = pair
        else:
            stream = "txt" if "add_" in inner else "img"
            old[f"double_blocks.{i}.{stream}_attn_qkv"] = joint(found, f"{kind}.{i}", FLUX_JOINT[stream])
    return kohya(old, "lora_unet")


def flux_xlabs(found: Layers) -> dict[str, Tensor]:
    """`double_blocks.0.processor.qkv_lora1.down.weight`, the image's, and 2, the text's; no alpha."""
    old: Layers = {}
    for block in sorted({layer.partition(".attn.")[0] for layer in found if ".attn." in layer}):
        kind, i = block.split(".")
        if kind == "single_transformer_blocks":
            old[f"single_blocks.{i}.processor.qkv_lora"] = joint(found, block, FLUX_JOINT["img"])
            old[f"single_blocks.{i}.processor.proj_lora"] = found[f"{block}.proj_out"]
            continue
        for n, (stream, out) in enumerate((("img", "to_out.0"), ("txt", "to_add_out")), start=1):
            old[f"double_blocks.{i}.processor.qkv_lora{n}"] = joint(found, block, FLUX_JOINT[stream])
            old[f"double_blocks.{i}.processor.proj_lora{n}"] = found[f"{block}.attn.{out}"]
    return {f"{k}.{part}.weight": v for k, pair in old.items() for part, v in zip(("down", "up"), pair, strict=True)}


def wan(found: Layers) -> dict[str, Any]:
    """`diffusion_model.blocks.0.self_attn.q.lora_down.weight`, with alpha."""
    state: dict[str, Tensor] = {}
    for layer, (down, up) in found.items():
        key = f"diffusion_model.{wan_key(layer)}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return state
