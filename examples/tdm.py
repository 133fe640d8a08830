"""TDM as a LoRA: distil Stable Diffusion 3.5 Medium into 4 ODE steps, each with the teacher's law where it ends.

    python examples/tdm.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "tdm",
    "teacher": "stabilityai/stable-diffusion-3.5-medium",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "steps": [4],
    "guidance_scale": 4.5,
    "learning_rate": 2e-5,
    "fake_score_learning_rate": 1e-4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_train_steps": 4000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "tdm-sd35",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
