"""DMD2 as a LoRA: distil Stable Diffusion 1.5 into 4 steps, from prompts alone.

    python examples/dmd2.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "dmd2",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "guidance_scale": 7.5,  # of the teacher's score: sample the student without guidance
    "steps": [4],
    "fake_score_updates": 5,
    "learning_rate": 5e-5,
    "fake_score_learning_rate": 1e-4,
    "train_batch_size": 16,
    "max_train_steps": 8000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "dmd2-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
