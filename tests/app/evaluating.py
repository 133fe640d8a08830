"""One evaluation by the command: its folders, its networks of random weights, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from tests.metrics.tiny_clip import noise_images, save_tiny_clip

NUM, PROMPTS = 12, ("a cat", "a dog", "a red apple", "a house", "a bird", "the sea")
METRICS = "fd_clip,recall,clip,cmmd,vendi,vendi_ratio,psnr_to_teacher,ssim_to_teacher,clip_to_teacher,pixel_distance"


class Setting:
    """Folders of one evaluation, and its command."""

    def __init__(self, folder: Path, teacher: Path):
        self.folder, self.teacher = folder, teacher
        self.reference, self.clip = (
            folder / "reference",
            save_tiny_clip(folder / "clip", seed=3),
        )  # scores of 10, and not below 0
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("\n".join(PROMPTS))
        self.reference.mkdir()
        for i, image in enumerate(noise_images(10, 64, 64, seed=3)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(self.reference / f"{i}.png")

    def command(self, out: Path, metrics: str = METRICS, *more: object, source: object = None) -> tuple[object, ...]:
        return (
            *("evaluate", source or self.teacher, "--metrics", metrics, "--out", out, "--reference", self.reference),
            *("--steps", "1", "--teacher-steps", 3, "-n", NUM, "--prompts", self.prompts, "--per-prompt", 2),
            *(
                "--batch",
                4,
                "--judge-batch",
                4,
                "--guidance-scale",
                1,
                "--clip-model",
                self.clip,
                "--manifold-space",
                "clip",
            ),
            *more,
        )


def images_of(out: Path, steps: str) -> list[Path]:
    (folder,) = out.with_suffix(".images").glob(f"*/{steps}-*")
    return sorted(folder.glob("*.png"))


def values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: figure["value"] for name, figure in row["metrics"].items()}
