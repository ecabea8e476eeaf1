"""Sizes, tokens and positions: how pictures lie in the transformer's sequence.

Follows bytedance/USO, `uso/flux/sampling.py` (`prepare_multi_ip`, `get_noise`, `get_schedule`).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# One token covers 2x2 latents of 8x8 pixels each.
PIXELS_PER_TOKEN = 16

# The official code shifts its schedule by (w // 8) * (h // 8) // 256 tokens: 64 at 1024x1024, which has 4096
# (mu 0.4675, not 1.15). Kept: the published weights' examples were made with it.
SCHEDULE_LATENTS_PER_TOKEN = 256

BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15

OffsetMode = Literal["d", "h", "w", "o"]


def schedule_tokens(*, width: int, height: int) -> int:
    """Token count by which the official code shifts the schedule of a `width` x `height` pixel picture."""
    return (width // 8) * (height // 8) // SCHEDULE_LATENTS_PER_TOKEN


def schedule_mu(
    *, width: int, height: int, base_shift: float = BASE_SHIFT, max_shift: float = MAX_SHIFT
) -> float:
    """Shift of the schedule, linear in `schedule_tokens`: 0.4675 at 1024x1024 by the official shifts."""
    slope = (max_shift - base_shift) / (MAX_TOKENS - BASE_TOKENS)
    return base_shift + slope * (schedule_tokens(width=width, height=height) - BASE_TOKENS)


def pack_latents(latents: Tensor) -> Tensor:
    """`(B, C, H, W)` latents to `(B, H/2 * W/2, 4C)` tokens, each (c, row, column) of a 2x2 square."""
    b, c, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2)  # (B, C, H, W) -> (B, C, h, ph, w, pw)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack_latents(tokens: Tensor, *, width: int, height: int) -> Tensor:
    """Inverse of `pack_latents` for a picture of `width` x `height` pixels, both multiples of 16."""
    b, _, channels = tokens.shape
    h, w = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    tokens = tokens.view(b, h, w, channels // 4, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, 2 * h, 2 * w)


def position_ids(rows: int, columns: int, *, row_offset: int = 0, column_offset: int = 0) -> Tensor:
    """`(rows * columns, 3)` float32 ids `(0, row, column)`, row by row."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None] + row_offset
    ids[..., 2] = torch.arange(columns)[None, :] + column_offset
    return ids.view(-1, 3)


def reference_position_ids(
    target: tuple[int, int], references: Sequence[tuple[int, int]], *, offset: OffsetMode = "d"
) -> list[Tensor]:
    """Ids of reference pictures: each lies diagonally beyond the target and the references before it.

    Args:
        target: rows and columns of the target, in tokens.
        references: rows and columns of each reference, in tokens.
        offset: axes that are offset: "d" both (USO's), "h" rows, "w" columns, "o" none.

    Returns:
        One `(rows * columns, 3)` float32 tensor a reference.
    """
    if offset not in ("d", "h", "w", "o"):
        raise ValueError(f"`offset` must be one of d, h, w, o, got {offset!r}")
    row_offset, column_offset = target
    ids = []
    for rows, columns in references:
        ids.append(
            position_ids(
                rows,
                columns,
                row_offset=row_offset if offset in ("d", "h") else 0,
                column_offset=column_offset if offset in ("d", "w") else 0,
            )
        )
        row_offset += rows
        column_offset += columns
    return ids
