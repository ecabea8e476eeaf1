"""Do viewers recognise the looks that photographs are drawn in? `python -m training.recognise DIR`.

Writes sheets DIR/<viewer>-<number>.png and their key. A row shows a photograph of the evaluation, what one
of METHODS made of it, and five style pictures: its own and four of other families, those whose colours are
most like its own's. A viewer says which it was. Each of VIEWERS sees every photograph once, by another method
than the others do, and is told neither methods nor truth.

`--answers FILE`, JSON of {"0": ["BADC...", ...], ...}: the letters given to the sheets of viewer 0 and so on,
by one or more. Prints the part of right ones by method: of all photographs, and of those in the evaluation's
grid.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from training.evaluate import draw, families_of, in_grid, load_pipeline, load_set, transfer_colour
from training.models import NANO
from training.pool import SIDE

METHODS = ("nano", "truth", "colour transfer", "Magenta")
VIEWERS = len(METHODS)
LETTERS = "ABCDE"
SHEETS = 4  # a viewer
SEED = 1
ENLARGED = 1.5
GAP, TITLE = 8, 16  # pixels


def palette(picture: np.ndarray) -> np.ndarray:
    """Each channel's values in CIELAB in order, float32 (256, 3), of uint8 (128, 128, 3)."""
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return np.sort(lab.reshape(-1, 3), axis=0)[:: SIDE**2 // 256]


def choices(palettes: np.ndarray, families: list[str], row: int) -> list[int]:
    """`row`, and others nearest to it by `palettes` (M, 256, 3), each of another family."""
    far = np.abs(palettes - palettes[row]).mean((1, 2))
    nearest = {families[row]: row}
    for other in np.argsort(far, kind="stable").tolist():
        nearest.setdefault(families[other], other)
    return list(nearest.values())[: len(LETTERS)]


def method_of(viewer: int, row: int) -> str:
    return METHODS[(viewer + row) % VIEWERS]


def draw_row(number: int, pictures: list[np.ndarray]) -> Image.Image:
    """One row of a sheet."""
    titles = ["photograph", "result", *LETTERS]
    side, step = round(SIDE * ENLARGED), round((SIDE + GAP) * ENLARGED)
    row = Image.new("RGB", (step * (1 + len(pictures)), step + TITLE), "white")
    canvas = ImageDraw.Draw(row)
    canvas.text((GAP, step // 2), f"{number:02d}", fill="black", font_size=24)
    for i, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        left = step // 2 + i * step + (i > 1) * GAP
        canvas.text((left, 0), title, fill="black", font_size=TITLE)
        row.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (left, TITLE + 4))
    return row


def write_sheets(
    folder: Path,
    content: np.ndarray,
    results: dict[str, np.ndarray],
    styles: np.ndarray,
    families: list[str],
) -> None:
    """The sheets of all viewers, and `key.json`: the right letter of each row.

    `content` and, by method, `results`: uint8 (N, 128, 128, 3). `styles` (M, 128, 128, 3) and their families:
    first those of the results, then others to choose from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(content)
    rng = np.random.default_rng(SEED)
    palettes = np.stack([palette(style) for style in styles])
    shown = [rng.permutation(choices(palettes, families, row)).tolist() for row in range(count)]
    key = "".join(LETTERS[rows.index(row)] for row, rows in enumerate(shown))
    (folder / "key.json").write_text(json.dumps(key))
    for viewer in range(VIEWERS):
        for sheet, part in enumerate(np.array_split(np.arange(count), SHEETS)):
            rows = [
                draw_row(row, [content[row], results[method_of(viewer, row)][row], *styles[shown[row]]])
                for row in part
            ]
            picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
            for i, row in enumerate(rows):
                picture.paste(row, (0, i * row.height))
            picture.save(folder / f"{viewer}-{sheet}.png")


def score_answers(key: str, answers: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """By method, the part that viewers found of all photographs and of those in the grid.

    Raises ValueError for a viewer that there is none of, other letters, or too few or many.
    """
    found: dict[str, list[tuple[int, bool]]] = {method: [] for method in METHODS}
    for viewer, given in answers.items():
        if viewer not in map(str, range(VIEWERS)):
            raise ValueError(f"answers: viewers are 0 to {VIEWERS - 1}, not {viewer!r}")
        for letters in given:
            if len(letters) != len(key):
                raise ValueError(f"answers: viewer {viewer} gave {len(letters)} letters for {len(key)} rows")
            if other := set(letters) - set(LETTERS):
                raise ValueError(f"answers: letters are {LETTERS}, not {''.join(sorted(other))}")
            for row, (letter, right) in enumerate(zip(letters, key, strict=True)):
                found[method_of(int(viewer), row)].append((row, letter == right))
    grid = set(in_grid(len(key)).tolist())
    return {
        method: (
            float(np.mean([right for _, right in rows])),
            float(np.mean([right for row, right in rows if row in grid])),
        )
        for method, rows in found.items()
        if rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sheets", type=Path, metavar="DIR", help="where the sheets are")
    parser.add_argument("--folder", type=Path, default=NANO, help="the model (default assets/nano)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="score these; draw nothing")
    a = parser.parse_args()
    if a.answers:
        key = json.loads((a.sheets / "key.json").read_text())
        for method, parts in score_answers(key, json.loads(a.answers.read_text())).items():
            print(f"{method:16} all {parts[0]:.2f}, grid {parts[1]:.2f}")
        return
    photographs, pipeline = load_set("photographs"), load_pipeline(a.folder)
    pairs = list(zip(photographs["content"], photographs["style"], strict=True))
    results = {
        "nano": np.stack([draw(pipeline, *pair) for pair in tqdm(pairs)]),
        "truth": photographs["truth"],
        "colour transfer": np.stack([transfer_colour(*pair) for pair in pairs]),
        "Magenta": photographs["magenta"],
    }
    others = load_set("looks")["style"]
    families = families_of("photographs", len(pairs)) + families_of("looks", len(others))
    styles = np.concatenate([photographs["style"], others])
    write_sheets(a.sheets, photographs["content"], results, styles, families)


if __name__ == "__main__":
    main()
