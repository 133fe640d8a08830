"""Ship a trained teacher: `python -m fewstep.distill.teachers.embed RUN [FOLDER]`.

UNet and autoencoder are written in float16, which diffusers loads into float32; the text encoder in float32, since
transformers loads the file's own dtype. Examples of its prompts lie beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fewstep.distill.prompt_sets import EXAMPLES, example_captions
from fewstep.samplers.load import EMBEDDED, load_pipeline


def main(run: str, folder: str | Path = EMBEDDED / "emoji") -> None:
    """Write the pipeline of a run's student, or of a pipeline's folder, into the package."""
    student = Path(run) / "student"
    pipeline = load_pipeline(str(student if student.is_dir() else run))
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for config in (Path(folder) / "model_index.json", *Path(folder).glob("*/config.json")):
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}  # of this machine
        config.write_text(json.dumps(kept, indent=2) + "\n")
    Path(folder, EXAMPLES).write_text("\n".join(example_captions()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
