"""Tiny pipelines as single files: the keys and shapes in which Stability, Runway, NVIDIA and Wan published checkpoints."""

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
SD3_ENDS = {
    **{"pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear"},
    **{
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    **{"time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2"},
    **{"time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0"},
    **{"time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2"},
}
SD3_TEXT = {
    **{"attn.add_q_proj": "attn.qkv", "attn.to_add_out": "attn.proj", "ff_context.net.0.proj": "mlp.fc1"},
    **{"norm1_context.linear": "adaLN_modulation.1", "ff_context.net.2": "mlp.fc2"},
    **{"attn.norm_added_q": "attn.ln_q", "attn.norm_added_k": "attn.ln_k"},
}
SD3_IMAGE = {
    **{"to_q": "qkv", "to_out.0": "proj", "norm_q": "ln_q", "norm_k": "ln_k", "norm1.linear": "adaLN_modulation.1"},
    **{"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"},
}
SANA = {
    **{"patch_embed.proj": "x_embedder.proj", "time_embed.linear": "t_block.1", "caption_norm": "attention_y_norm"},
    **{"time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0", "transformer_blocks": "blocks"},
    **{"time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "proj_out": "final_layer.linear"},
    **{"caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2"},
    **{"attn1.to_q": "attn.qkv", "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear"},
    **{"attn2.to_k": "cross_attn.kv_linear", "attn2.to_out.0": "cross_attn.proj"},
    **{"ff.conv_inverted": "mlp.inverted_conv.conv", "ff.conv_depth": "mlp.depth_conv.conv"},
    **{"ff.conv_point": "mlp.point_conv.conv"},
}
HELD = {
    **{"WanPipeline": ("transformer",), "SanaPipeline": ("transformer",)},
    "StableDiffusion3Pipeline": ("transformer", "vae", "text_encoder_3"),
}
"""Components that a file has, where these are not all."""


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


def joined(state: dict[str, Tensor], joints: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """With projections that their authors have in one matrix under the first's name, and the others left out."""
    found = dict(state)
    for key in state:
        for first, rest in joints.items():
            if f".{first}." in key:
                parts = [found.pop(key.replace(f".{first}.", f".{name}.")) for name in rest]
                found[key] = torch.cat([found[key], *parts])
    return found


def swapped(weight: Tensor) -> Tensor:
    """Scale and shift, which diffusers has the other way round."""
    return torch.cat(weight.chunk(2)[::-1])


def sd3_file(transformer: Any) -> dict[str, Tensor]:
    joints = {"attn.to_q": ("attn.to_k", "attn.to_v"), "attn2.to_q": ("attn2.to_k", "attn2.to_v")}
    joints["attn.add_q_proj"] = ("attn.add_k_proj", "attn.add_v_proj")
    last, found = transformer.config.num_layers - 1, {}
    for key, v in joined(transformer.state_dict(), joints).items():
        if key.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context")):
            v = swapped(v)
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", key)
        if block is None:
            key = replaced(key, SD3_ENDS)
        elif re.search(r"context|add", key):
            key = f"joint_blocks.{block[1]}.context_block.{replaced(block[2], SD3_TEXT)}"
        else:
            key = f"joint_blocks.{block[1]}.x_block.{replaced(block[2], SD3_IMAGE)}"
        found[f"model.diffusion_model.{key}"] = v
    return found


def sana_file(transformer: Any) -> dict[str, Tensor]:
    """With the table of positions and the null caption, which diffusers leaves out."""
    state = joined(
        transformer.state_dict(), {"attn1.to_q": ("attn1.to_k", "attn1.to_v"), "attn2.to_k": ("attn2.to_v",)}
    )
    found = {replaced(k, SANA): v for k, v in state.items()}
    found["final_layer.scale_shift_table"] = found.pop("scale_shift_table")
    return found | {"pos_embed": torch.zeros(1, 64, 16), "y_embedder.y_embedding": torch.zeros(300, 16)}


def original(pipeline: Any) -> dict[str, Tensor]:
    """What the authors of a family put into one file: of Wan and Sana the transformer alone, of SD 3 no CLIP here."""
    kind = type(pipeline).__name__
    if kind == "WanPipeline":
        return {wan_key(k): v for k, v in pipeline.transformer.state_dict().items()}
    if kind == "SanaPipeline":
        return sana_file(pipeline.transformer)
    if kind == "StableDiffusion3Pipeline":
        t5 = {
            f"text_encoders.t5xxl.transformer.{k}": v.clone() for k, v in pipeline.text_encoder_3.state_dict().items()
        }
        return sd3_file(pipeline.transformer) | vae_file(pipeline.vae) | t5
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
    for part in HELD.get(type(pipeline).__name__, ("unet", "vae", "text_encoder", "text_encoder_2")):
        for weights in (config / part).glob("*.safetensors"):
            weights.unlink()
    return f"{file}@{config}"
