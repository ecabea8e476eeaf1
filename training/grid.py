"""Draw what nano makes of unseen subjects in unseen looks: `python -m training.grid sheet.png`.

Left to right: content, style, result at 512 and at 1024 pixels (shrunk), truth; then results with two style
pictures, with words for the look in place of a picture, and with a style and the subject's name alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.models import NANO
from training.pool import PICTURES, POOL
from uso.model.pipeline import USOPipeline

CELL = 128


def draw(
    pipeline: USOPipeline,
    prompt: str,
    content: Image.Image | None,
    styles: list[Image.Image],
    pixels: int = 512,
) -> Image.Image:
    """One square picture of `pixels`, in 12 steps from seed 0."""
    images: list[Image.Image] = pipeline(
        prompt,
        content_image=content,
        style_images=styles,
        height=pixels,
        width=pixels,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
    )[0]
    return images[0]


def draw_sheet(pipeline: USOPipeline, split: str, *, rows: int, seed: int) -> Image.Image:
    """Two columns of `rows` examples each."""
    folder = min(POOL.glob(f"{split}-*"))
    content, target = (np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in ("content", "target"))
    names = [subject["name"] for subject in json.loads((POOL / "subjects.json").read_text())]
    subjects = [names[row] for row in np.load(folder / "subject.npy")]
    looks = json.loads((folder / "looks.json").read_text())
    sheet = Image.new("RGB", (CELL * 8 * 2 + 16, CELL * rows), "white")
    for i, look in enumerate(np.random.default_rng(seed).choice(len(looks), 2 * rows, replace=False)):
        row = look * PICTURES
        plain, truth = Image.fromarray(content[row]), Image.fromarray(target[row])
        styles = [Image.fromarray(target[row + 1]), Image.fromarray(target[row + 2])]

        cells = [
            plain,
            styles[0],
            draw(pipeline, "", plain, styles[:1]),
            draw(pipeline, "", plain, styles[:1], pixels=1024),
            truth,
            draw(pipeline, "", plain, styles),
            draw(pipeline, looks[look]["words"], plain, []),
            draw(pipeline, subjects[row], None, styles[:1]),
        ]
        for column, cell in enumerate(cells):
            place = ((i % 2) * (CELL * 8 + 16) + column * CELL, i // 2 * CELL)
            sheet.paste(cell.resize((CELL, CELL), Image.Resampling.LANCZOS), place)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--folder", type=Path, default=NANO)
    parser.add_argument("--split", choices=("looks", "families"), default="looks")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    pipe = USOPipeline.from_pretrained(a.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    draw_sheet(pipe, a.split, rows=a.rows, seed=a.seed).save(a.sheet)
