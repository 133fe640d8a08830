"""Tiny pipelines as single files: the keys and shapes in which Stability, Runway and Wan published their checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
UNET_ENDS = {
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.": "ln_final.",
    **{"text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2"},
    **{".fc1.": ".c_fc.", ".fc2.": ".c_proj.", "self_attn.": "attn."},
}
WAN = {
    **{"condition_embedder.time_embedder.linear_1": "time_embedding.0"},
    **{"condition_embedder.time_embedder.linear_2": "time_embedding.2"},
    **{"condition_embedder.text_embedder.linear_1": "text_embedding.0"},
    **{"condition_embedder.text_embedder.linear_2": "text_embedding.2"},
    **{"condition_embedder.time_proj": "time_projection.1", "attn1": "self_attn", "attn2": "cross_attn"},
    **{"to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"},
    **{"norm2": "norm3", "norm3": "norm2", "proj_out": "head.head"},
}


def replaced(key: str, names: dict[str, str]) -> str:
    """The first match at each place, so that two names can be swapped."""
    return re.sub("|".join(map(re.escape, names)), lambda m: names[m[0]], key)


def unet_key(key: str, per_block: int, attends: list[bool]) -> str:
    """Of a UNet with `per_block` resnets in each block down; `attends`: which blocks up have attention."""
    for name, old in UNET_ENDS.items():
        if key.startswith(f"{name}."):
            return old + key.removeprefix(name)
    found = re.match(r"(mid_block|down_blocks|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", key)
    assert found, key
    block, kind, inner = found[1], found[3], found[5]
    i, j = int(found[2] or 0), int(found[4])
    inner = replaced(inner, RESNET) if kind == "resnets" else inner
    if block == "mid_block":
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(i + 1) * (per_block + 1)}.0.{inner.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{i * (per_block + 1) + per_block}.{2 if attends[i] else 1}.{inner}"
    place = int(kind == "attentions")
    if block == "down_blocks":
        return f"input_blocks.{1 + i * (per_block + 1) + j}.{place}.{inner}"
    return f"output_blocks.{i * (per_block + 1) + j}.{place}.{inner}"


def unet_file(unet: Any) -> dict[str, Tensor]:
    attends = ["Cross" in name for name in unet.config.up_block_types]
    per_block = unet.config.layers_per_block
    return {f"model.diffusion_model.{unet_key(k, per_block, attends)}": v for k, v in unet.state_dict().items()}


def vae_file(vae: Any) -> dict[str, Tensor]:
    found, last = {}, len(vae.config.up_block_types) - 1
    for key, v in vae.state_dict().items():
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "attentions" in key:
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            key = replaced(key.replace("mid_block.attentions.0", "mid.attn_1"), names)
            v = v[:, :, None, None] if v.ndim == 2 else v  # a convolution of one pixel
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        found[f"first_stage_model.{key}"] = v
    return found


def text_state(encoder: nn.Module) -> dict[str, Tensor]:
    """With the prefix that newer versions of transformers leave out."""
    state = encoder.state_dict()
    return {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()}


def clip_file(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.transformer.{k}": v for k, v in text_state(encoder).items()}


def open_clip_file(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """With the three projections of an attention in one matrix."""
    found, state = {}, text_state(encoder)
    for key, v in state.items():
        if key == "text_projection.weight":
            found["text_projection"] = v.T.contiguous()
        elif ".q_proj." in key:
            three = torch.cat([state[key.replace(".q_proj.", f".{n}_proj.")] for n in "qkv"])
            found[replaced(key, OPEN_CLIP).replace(".q_proj.", ".in_proj_")] = three
        elif ".k_proj." not in key and ".v_proj." not in key:
            found[replaced(key, OPEN_CLIP)] = v
    return {f"{prefix}.model.{k}": v for k, v in found.items()}


def wan_key(key: str) -> str:
    if key.endswith("scale_shift_table"):
        return key.replace("scale_shift_table", "modulation" if "blocks" in key else "head.modulation")
    return replaced(key, WAN)


def original(pipeline: Any) -> dict[str, Tensor]:
    """What the authors of a family put into one file: of Wan the transformer alone."""
    kind = type(pipeline).__name__
    if kind == "WanPipeline":
        return {wan_key(k): v for k, v in pipeline.transformer.state_dict().items()}
    state = unet_file(pipeline.unet) | vae_file(pipeline.vae)
    if kind == "StableDiffusionXLPipeline":
        first = clip_file(pipeline.text_encoder, "conditioner.embedders.0")
        return state | first | open_clip_file(pipeline.text_encoder_2, "conditioner.embedders.1")
    of_two = pipeline.scheduler.config.prediction_type == "v_prediction"
    return state | (open_clip_file if of_two else clip_file)(pipeline.text_encoder, "cond_stage_model")


def publish(pipeline: Any, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """FILE@CONFIG in a folder; the config has no weights of what the file holds."""
    from safetensors.torch import save_file

    file, config = folder / "published+model.safetensors", folder / "config"
    pipeline.save_pretrained(config, safe_serialization=True)
    save_file({k: v.to(dtype).contiguous() for k, v in original(pipeline).items()}, file)
    for part in (
        ("transformer",) if hasattr(pipeline, "transformer") else ("unet", "vae", "text_encoder", "text_encoder_2")
    ):
        for weights in (config / part).glob("*.safetensors"):
            weights.unlink()
    return f"{file}@{config}"
