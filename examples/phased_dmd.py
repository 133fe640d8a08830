"""Phased DMD as a LoRA: distil Wan 2.2 into 4 steps, a phase for each of its two transformers.

    python examples/phased_dmd.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no clip is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "phased_dmd",
    "teacher": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "guidance_scale": 4.0,
    "learning_rate": 2e-5,
    "fake_score_learning_rate": 4e-5,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "max_train_steps": 4000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm", "a fox runs through the snow"],
    "name": "phased-dmd-wan22",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
