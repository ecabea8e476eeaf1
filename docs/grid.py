"""The grid of the README: `python docs/grid.py` draws assets/examples with nano into docs/grid.jpg."""

import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from uso import load_pipeline  # noqa: E402
from uso.images import open_image  # noqa: E402

SUBJECTS = ("fox", "sailboat")
STYLES = ("pop-art", "blueprint", "gradient-map", "halftone", "delft-tile")
CELL = 256
GAP = 8


def main() -> None:
    pipe = load_pipeline("nano")
    pipe.set_progress_bar_config(disable=True)
    examples = {name: open_image(ROOT / f"assets/examples/{name}.jpg") for name in SUBJECTS + STYLES}
    columns, rows = len(STYLES) + 1, len(SUBJECTS) + 1
    grid = Image.new("RGB", (columns * (CELL + GAP) - GAP, rows * (CELL + GAP) - GAP), "white")

    def put(image: Image.Image, column: int, row: int) -> None:
        cell = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
        grid.paste(cell, (column * (CELL + GAP), row * (CELL + GAP)))

    for column, style in enumerate(STYLES, 1):
        put(examples[style], column, 0)
    for row, subject in enumerate(SUBJECTS, 1):
        put(examples[subject], 0, row)
        for column, style in enumerate(STYLES, 1):
            drawn = pipe(
                "",
                content_image=examples[subject],
                style_images=examples[style],
                width=1024,
                height=1024,
                generator=torch.Generator().manual_seed(7),
            )
            put(drawn.images[0], column, row)
    grid.save(ROOT / "docs/grid.jpg", quality=88)


if __name__ == "__main__":
    main()
