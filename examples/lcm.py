"""LCM-LoRA: distil Stable Diffusion 1.5 into 1-8 steps, on images with captions.

    python examples/lcm.py train_data=FOLDER [key=value ...]

FOLDER holds images, each with a caption in a .txt file of the same name.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "lcm",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "train_data": "images",
    "student": "lora",
    "rank": 64,
    "guidance_scale": 7.5,  # of the teacher, folded into the student: sample it without guidance
    "steps": [1, 2, 4, 8],
    "learning_rate": 1e-4,
    "train_batch_size": 16,
    "max_train_steps": 2000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "lcm-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
