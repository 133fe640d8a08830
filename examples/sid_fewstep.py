"""Few-step SiD as a LoRA: distil Stable Diffusion 1.5 into 4 steps, with Zero-CFG.

    python examples/sid_fewstep.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "sid_fewstep",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "steps": [4],
    "guidance_scale": 1.0,  # Zero-CFG: none on the teacher,
    "fake_guidance_scale": 0.0,  # and a fake score that is not told the prompt
    "fake_train_guidance_scale": 0.0,
    "prompt_dropout": 0.0,
    "learning_rate": 2e-5,
    "fake_score_learning_rate": 5e-5,
    "train_batch_size": 16,
    "max_train_steps": 4000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "sid-fewstep-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
