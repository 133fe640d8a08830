"""Make the shipped sheet of drawings: `python -m fewstep.distill.teachers.drawings PACKAGE`.

PACKAGE is the unpacked npm package `emoji-datasource-google` 16.0.0 (`npm pack emoji-datasource-google@16.0.0`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from fewstep.metrics.emoji.drawings import NAMES, SHEET, SIDE


def noto(package: Path) -> dict[str, Image.Image]:
    """Every drawing of the package but flags, by lower-case Unicode name, 64x64 RGBA."""
    entries = json.loads((package / "emoji.json").read_text())
    return {
        e["name"].lower(): Image.open(package / "img/google/64" / e["image"]).convert("RGBA")
        for e in entries
        if e.get("has_img_google") and e["category"] != "Flags" and e["name"]
    }


def main(package: str, columns: int = 10) -> None:
    """Write the sheet into the metrics package."""
    drawings = noto(Path(package))
    sheet = Image.new("RGBA", (columns * SIDE, -(-len(NAMES) // columns) * SIDE))
    for i, name in enumerate(NAMES):
        sheet.paste(drawings[name], (i % columns * SIDE, i // columns * SIDE))
    SHEET.parent.mkdir(exist_ok=True)
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
