"""SiD: distil Stable Diffusion 1.5 into one step, from prompts alone, guided long and short.

    python examples/sid.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "sid",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "prompts": "prompts.txt",
    "student": "full",
    "guidance_scale": 1.5,  # of the teacher
    "fake_guidance_scale": 1.5,  # of the fake score, where the two are compared
    "fake_train_guidance_scale": 1.5,  # and where it is trained
    "learning_rate": 1e-6,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 64,
    "max_train_steps": 20000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "sid-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
