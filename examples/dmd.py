"""DMD as a LoRA: distil Stable Diffusion 1.5 into one step, held to 5,000 of the teacher's own samples.

    python examples/dmd.py prompts=FILE [key=value ...]

FILE holds a prompt a line; no image is needed. LPIPS needs torchvision's weights of vgg16, fetched if they are not there;
regression_metric=squared compares latents and needs none.
"""

import sys

from fewstep.distill import load_config, train
from fewstep.distill.console import answer

config = {
    "method": "dmd",
    "teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "prompts": "prompts.txt",
    "student": "lora",
    "rank": 64,
    "guidance_scale": 3.0,  # of the teacher, in its score and in its pairs: sample the student without guidance
    "num_pairs": 5000,
    "pair_steps": 50,
    "regression_weight": 0.25,
    "learning_rate": 5e-5,
    "fake_score_learning_rate": 1e-4,
    "train_batch_size": 8,
    "max_train_steps": 10000,
    "mixed_precision": "bf16",
    "validation_prompts": ["a lighthouse in a storm, oil painting", "a fox in the snow"],
    "name": "dmd-sd15",
}

if __name__ == "__main__":
    sys.exit(answer(lambda: print("student:", train(load_config(config, sys.argv[1:])) / "student")))
