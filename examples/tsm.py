"""Teacher score matching: a smaller Stable Diffusion 1.5 of many steps, where a small student of few steps begins.

    python examples/tsm.py train_data=FOLDER [key=value ...]

Then, for one: fewstep train dmd2/sd15 prompts=FILE student_init=runs/small-sd15
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "tsm",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "train_data": "images",
    "student_config": {"layers_per_block": 1},  # of the UNet's own config; 67% of its parameters
    "learning_rate": 2e-5,
    "lr_warmup_steps": 500,
    "ema_decay": 0.9999,
    "train_batch_size": 32,
    "gradient_accumulation_steps": 8,
    "max_train_steps": 50_000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "validation_guidance_scale": 7.5,
    "name": "small-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("pipeline:", train(load_config(config, sys.argv[1:])) / "student")))
