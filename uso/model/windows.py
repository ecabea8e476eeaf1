"""Any shape from a model that draws one square: MultiDiffusion (Bar-Tal et al., 2023, arXiv 2302.08113).

Squares of the size that the model knows lie over the picture. In each step it sees every one by itself, with
the part of the content picture under it, and where they overlap its predictions are averaged.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from uso.model.geometry import PIXELS_PER_TOKEN


@dataclass(frozen=True)
class Windows:
    """What is drawn for a picture, in pixels, and the windows in which the model sees it.

    Args:
        width, height: of what is drawn.
        window: width and height of each window; all of it for a model that draws any shape.
    """

    width: int
    height: int
    window: tuple[int, int]

    @classmethod
    def over(
        cls, width: int, height: int, *, scale: float, side: int | None, content: bool = True
    ) -> "Windows":
        """For an asked `width` x `height`: `scale` of it, in multiples of 16, or with the short side `side`.

        In the second case the long one is rounded up such that a window can lie in the middle, where the
        subject is; `USOPipeline.fit` takes the asked proportions from it. Without a `content` picture it is
        one square: in each of several the model would draw all that the prompt tells.
        """
        if side is None:
            drawn = round_to_tokens(width * scale), round_to_tokens(height * scale)
            return cls(*drawn, window=drawn)
        if not content:
            return cls(side, side, window=(side, side))
        short, pair = min(width, height), 2 * PIXELS_PER_TOKEN
        width, height = (
            side + math.ceil((asked - short) * side / (short * pair)) * pair for asked in (width, height)
        )
        return cls(width, height, window=(side, side))

    @property
    def tokens(self) -> int:
        """Tokens of one window."""
        width, height = self.window
        return width // PIXELS_PER_TOKEN * (height // PIXELS_PER_TOKEN)

    @cached_property
    def index(self) -> Tensor:
        """`(B, tokens)`: which of the picture's tokens are in each window."""
        columns, rows = (
            torch.tensor(_starts(drawn, window))[:, None] + torch.arange(window // PIXELS_PER_TOKEN)
            for drawn, window in zip((self.width, self.height), self.window, strict=True)
        )  # (windows on the axis, tokens of a window's side)
        row_starts = rows * (self.width // PIXELS_PER_TOKEN)
        return (row_starts[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)

    @cached_property
    def shares(self) -> Tensor:
        """`(B, tokens, 1)`: a window's part in the mean; it falls towards its edges, so that none shows."""
        across, down = (_ramp(pixels // PIXELS_PER_TOKEN) for pixels in self.window)
        weights = torch.outer(down, across).flatten().expand(self.index.shape)
        sums = torch.zeros(int(self.index.max()) + 1).index_put_((self.index,), weights, accumulate=True)
        return (weights / sums[self.index])[..., None]

    def __len__(self) -> int:
        columns, rows = (
            len(_starts(*pair)) for pair in zip((self.width, self.height), self.window, strict=True)
        )
        return columns * rows

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens of the whole picture, `(1, N, C)`, to those in its windows, `(B, tokens, C)`."""
        if len(self) == 1:
            return tokens
        count = self.width * self.height // PIXELS_PER_TOKEN**2
        if tokens.shape[1] != count:
            raise ValueError(
                f"latents must be those of {self.width}x{self.height} pixels, which are {count} tokens, "
                f"got {tokens.shape[1]}"
            )
        return tokens[0, self.index.to(tokens.device)]

    def merge(self, tokens: Tensor) -> Tensor:
        """The mean where windows overlap: `(B, tokens, C)` to `(1, N, C)`."""
        if len(self) == 1:
            return tokens
        parts = tokens * self.shares.to(tokens)
        picture = parts.new_zeros(int(self.index.max()) + 1, parts.shape[2])
        return picture.index_add_(0, self.index.flatten().to(parts.device), parts.flatten(0, 1))[None]


def continue_edges(pixels: Tensor, *, width: int, height: int) -> Tensor:
    """`(..., h, w)` in the middle of `height` x `width`; its edges, softened, fill the rest."""
    return _continue_columns(_continue_columns(pixels, width).mT, height).mT


def _continue_columns(pixels: Tensor, width: int) -> Tensor:
    spare = width - pixels.shape[-1]
    if spare <= 0:
        return pixels
    edges = torch.cat([pixels[..., :1], pixels[..., -1:]], dim=-1).mT  # (..., 2, h)
    reach = pixels.shape[-2] // 8
    soft = edges.reshape(1, -1, edges.shape[-1])
    for _ in range(2):
        soft = F.avg_pool1d(F.pad(soft, (reach, reach), mode="replicate"), 2 * reach + 1, stride=1)
    before, after = soft.view(edges.shape).mT.split(1, dim=-1)  # (..., h, 1) each
    left = spare // 2
    sides = before.expand(*before.shape[:-1], left), after.expand(*after.shape[:-1], spare - left)
    return torch.cat([sides[0], pixels, sides[1]], dim=-1)


def round_to_tokens(pixels: float) -> int:
    """The nearest multiple of 16, at least 16."""
    return max(round(pixels / PIXELS_PER_TOKEN), 1) * PIXELS_PER_TOKEN


def _starts(drawn: int, window: int) -> list[int]:
    """First token of each window on an axis, evenly spread: an odd number, half a window apart at most."""
    spare = (drawn - window) // PIXELS_PER_TOKEN
    half = math.ceil((drawn - window) / window)
    return [round(i * spare / max(2 * half, 1)) for i in range(2 * half + 1)]


def _ramp(length: int) -> Tensor:
    """1, 2, 3, ... and down again."""
    there = torch.arange(1.0, length + 1)
    return torch.minimum(there, there.flip(0))
