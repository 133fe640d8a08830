"""An untrained Stable Diffusion pipeline around the embedded autoencoder.

`python -m fewstep.distill.teachers.untrained VAE OUT`: what `fewstep train teachers/emoji teacher=OUT` then trains.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fewstep.metrics.emoji.drawings import CATEGORIES, COLORS, NAMES

TOKENS = 24


def tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer that knows the captions' words: letters, and one merge chain a word."""
    from transformers import CLIPTokenizer

    text = " ".join(["a", "an", "on", "background", *COLORS, *CATEGORIES, *NAMES]).replace("-", " - ")
    letters = sorted(set(text.replace(" ", "")) | set("abcdefghijklmnopqrstuvwxyz-"))
    tokens = [*letters, *(c + "</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(text.split()):
        parts = [*word[:-1], word[-1] + "</w>"]
        whole = parts[0]
        for part in parts[1:]:
            if (whole, part) not in merges:
                merges.append((whole, part))
            whole += part
            if whole not in tokens:
                tokens.append(whole)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def main(vae: str, out: str, prediction_type: str = "v_prediction", seed: int = 0) -> None:
    """Write the pipeline's folder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=128,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    zero_snr = prediction_type == "v_prediction"
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=zero_snr,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
