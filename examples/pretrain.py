"""Ordinary training: fine-tune a pipeline's network on images with captions, with text dropout for guidance.

    python examples/pretrain.py train_data=FOLDER [key=value ...]

What it makes is a whole pipeline folder, and can be the `teacher` of the other methods.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "pretrain",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # where the weights start
    "train_data": "images",
    "student": "full",
    "prompt_dropout": 0.1,
    "snr_gamma": 5.0,
    "learning_rate": 1e-5,
    "lr_warmup_steps": 500,
    "ema_decay": 0.9999,
    "train_batch_size": 16,
    "max_train_steps": 10_000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "fine-tuned-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("pipeline:", train(load_config(config, sys.argv[1:])) / "student")))
