"""DisBack as a LoRA: distil Stable Diffusion 1.5 into one step, along a recorded path of teachers, from prompts alone.

    python examples/disback.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "disback",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "guidance_scale": 7.5,  # of the teacher's score: sample the student without guidance
    "fake_score_warmup_steps": 500,  # recorded
    "nodes": 5,
    "node_steps": 500,  # with each node as the target; then the teacher, to the end
    "learning_rate": 5e-5,
    "fake_score_learning_rate": 1e-4,
    "train_batch_size": 16,
    "max_train_steps": 16000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "disback-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
