"""The shipped teacher: a stock pipeline's folder, to diffusers and to a training alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from fewstep.app.sample import sampler_of
from fewstep.distill import load_config, train
from fewstep.samplers.load import EMBEDDED
from tests.strangers import run

FOLDER = EMBEDDED / "emoji"
PROMPT, SEED, GUIDANCE = "a fruit on a blue background", 3, 2.0

# No dtype: transformers loads an encoder in the type of its file, diffusers the rest in float32.
BARE = f"""
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

try:
    import fewstep
except ImportError:
    pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
    seed = torch.Generator().manual_seed({SEED})
    images = pipe({PROMPT!r}, num_inference_steps=2, guidance_scale={GUIDANCE}, generator=seed, output_type="np").images
    np.save("image.npy", images)
else:
    raise SystemExit("fewstep can be imported")
"""


def test_the_bare_snippet_draws_what_sample_draws(tmp_path: Path):
    """In a process without this project, with the scheduler that lies in the folder."""
    run(BARE, tmp_path, str(FOLDER))
    theirs = torch.from_numpy(np.load(tmp_path / "image.npy")).permute(0, 3, 1, 2)
    assert theirs.shape == (1, 3, 64, 64)
    assert theirs.isfinite().all()
    ours = sampler_of("embedded:emoji", 2, GUIDANCE, "own").images([PROMPT], [SEED])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.05  # a picture, and no grey


def test_a_copy_elsewhere_trains_bit_identically(tmp_path: Path):
    """quickstart, two iterations: nothing depends on what the teacher is called, or on where it lies."""
    copied = Path(shutil.copytree(FOLDER, tmp_path / "mine"))
    students = []
    for teacher in ("embedded:emoji", str(copied)):
        place = tmp_path / str(len(students))
        small = (
            "max_train_steps=2",
            "train_batch_size=2",
            *("num_pairs=64", "pair_steps=2", "regression_warmup_steps=1"),
            "report_num=null",
            "validation_steps=null",
            "preflight=false",
        )
        where = (f"teacher={teacher}", f"output_dir={place}", f"cache_dir={place / 'cache'}")
        students.append(
            load_file(train(load_config("quickstart", (*small, *where))) / "student/pytorch_lora_weights.safetensors")
        )
    named, copy = students
    assert named.keys() == copy.keys()
    assert all(torch.equal(named[key], copy[key]) for key in named)
    assert any(value.abs().max() > 0 for key, value in named.items() if ".lora_B." in key)  # and it did train
