"""Uni-Instruct as a LoRA: distil Stable Diffusion 1.5 into one step by an f-divergence, on images with captions.

    python examples/uni_instruct.py train_data=FOLDER [key=value ...]

FOLDER holds images, each with a caption in a .txt file of the same name: best, what the guided teacher made.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "uni_instruct",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "train_data": "images",
    "student": "lora",
    "rank": 64,
    "f": "js",  # Jensen-Shannon
    "guidance_scale": 4.5,  # of the teacher's score: sample the student without guidance
    "gan_warmup_steps": 800,  # until then every sample weighs the same
    "learning_rate": 2e-5,
    "fake_score_learning_rate": 5e-5,
    "train_batch_size": 16,
    "max_train_steps": 8000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "uni-instruct-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
