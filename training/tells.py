"""What style tokens shall tell of a look: where its screens and grids lie, its parameters and its palette.

Screens of dots and lines and grids of cells are counted from the picture's corner, so that in every picture
in a look they lie alike. A spacing that is 3 % off is off by half of itself in the middle of the picture; and
what the transformer cannot know it draws as the mean of what may be, which is flat.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.looks import FAMILIES
from training.models import STYLE_TOKENS, STYLE_WIDTH

# parts of the side: eighths, where the transformer's tokens begin, and small ones, by which these are found
PLACES = np.array([1 / 64, 1 / 32, 1 / 16, *np.arange(1, 8) / 8])
WAVES = 6  # a look, at most
PARAMETERS = max(len(family.ranges) for family in FAMILIES.values())
COLOURS = 5 * 3
PARTS = (WAVES * 2 * len(PLACES) * 2, len(FAMILIES) * PARAMETERS, COLOURS)  # phases, parameters, palette
WEIGHTS = (1.0, 0.5, 0.5)  # of their squared errors
GRIDS = (
    "pixel art",
    "mosaic",
    "perler beads",
    "cross stitch",
    "knitted",
    "patchwork quilt",
    "geometric tiles",
    "terminal text",
)
SCREENS = {  # turns of their waves, in degrees
    "halftone": (0, 90),
    "pop art": (0, 90),
    "newsprint": (15, 105, 75, 165, 0, 90),
    "crosshatch": (90, 180, 135, 225),
    "engraving": (90,),
}


def waves(family: str, params: dict[str, Any]) -> list[tuple[float, float]]:
    """The wave vectors (x, y) of a look's screens or grid, in cycles a side; none where it has neither."""

    def turned(degrees: float, spacing: float) -> tuple[float, float]:
        angle = math.radians(degrees)
        return math.cos(angle) / spacing, math.sin(angle) / spacing

    if family in SCREENS:
        spacing = params["spacing"] if "spacing" in params else params["cell"]
        return [turned(params["angle"] + turn, spacing) for turn in SCREENS[family]]
    if family in GRIDS:
        cells = max(4, round(1 / params["cell"]))  # as `Scene.cells`
        wide = round(1.4 * cells) if family == "terminal text" else cells
        shifted = cells / 2 if family == "perler beads" else 0  # every second row, by half a cell
        return [(wide, shifted), (0, 1.3 * cells if family == "knitted" else cells)]
    if family in ("blueprint", "delft tile"):
        lines = 1 / params["grid" if family == "blueprint" else "tile"]
        return [(lines, 0), (0, lines)]
    if family == "crt screen":
        return [(0, 1 / params["pitch"])]
    if family == "reeded glass":
        return [turned(round(params["angle"] / 90) * 90, params["ribs"])]
    return []


def to_be_told(look: dict[str, Any]) -> np.ndarray:
    """A look of the pool's `looks.json` as numbers in [-1, 1], not a number where they are unknown: `(D,)`.

    Cosine and sine of each wave's phase at PLACES along either side; parameters between the ends of their
    ranges, each family's in a place of their own; palette. Nothing is known of painted looks.
    """
    family, params = look["family"], look.get("params", {})
    phases = np.full((WAVES, 2, len(PLACES), 2), np.nan, np.float32)
    for i, wave in enumerate(waves(family, params)):
        turn = 2 * np.pi * np.outer(wave, PLACES)
        phases[i] = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    values = np.full((len(FAMILIES), PARAMETERS), np.nan, np.float32)
    for i, (name, value) in enumerate(params.items()):
        choices = FAMILIES[family].ranges[name]
        if isinstance(value, str):
            choices, value = tuple(range(len(choices))), choices.index(value)
        place = list(FAMILIES).index(family), i
        values[place] = 2 * (value - min(choices)) / (max(choices) - min(choices)) - 1
    palette = 2 * np.array(look.get("palette", np.full(COLOURS, np.nan)), np.float32) - 1
    return np.concatenate([phases.ravel(), values.ravel(), palette.ravel()])


class Tells(nn.Module):
    """Reads from a picture's style tokens what they tell of its look: `(B, T, C)` to `(B, D)`."""

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        width = STYLE_TOKENS * STYLE_WIDTH
        self.read = nn.Sequential(
            nn.Flatten(),
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, sum(PARTS)),
        )

    def loss(self, tokens: Tensor, told: Tensor) -> Tensor:
        """Weighted mean squared errors of what is known of `told` `(B, D)`."""
        off = (self.read(tokens.float()) - told).split(PARTS, dim=1)
        known = [(~part.isnan()).sum().clamp(min=1) for part in off]
        errors = [part.nan_to_num().square().sum() / count for part, count in zip(off, known, strict=True)]
        return torch.stack(errors) @ torch.tensor(WEIGHTS, device=told.device)
