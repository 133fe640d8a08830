"""Multi-student DMD2: Stable Diffusion 1.5 as four LoRAs of one step, each for a quarter of the prompts.

    python examples/msd.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed. `parts` goes with any method of the distribution matching family but
phased_dmd, and with teachers of one network (not Wan 2.2).
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "dmd2",
    "parts": 4,
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "steps": [1],
    "guidance_scale": 1.75,
    "fake_score_updates": 10,
    "learning_rate": 5e-5,
    "fake_score_learning_rate": 1e-4,
    "train_batch_size": 16,
    "max_train_steps": 4000,  # of each
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "msd-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
