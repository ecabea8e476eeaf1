"""How far colours and textures of pictures are from those of others, wherever they lie.

Where a look's dots, strokes or contours will lie can often not be told, and squared errors ask for the mean
of what may be, which is blurred. The distributions of a picture's colours and of its small patches are known
better. Compared are their projections on random directions (sliced Wasserstein distances: Rabin et al., 2011;
of patches: Elnekave and Weiss, 2022).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (1, 2, 4)  # sides of squares of which a patch's pixels are the means
COLOUR_SCALES = (1, 4)
PATCH = 5
DIRECTIONS = 12  # at each scale
POSITIONS = 2048  # at most, at random
LEAST = 0.01  # of a distance, of pixels in [-1, 1]: nearer ones count alike (bfloat16's steps are as large)


def textures_off(pictures: Tensor, others: Tensor) -> Tensor:
    """How far `(B, 3, H, W)` pictures in [-1, 1] are from others: `(B,)`.

    Of colours and of patches the mean logarithm of the distances at their scales, both added.
    """
    loss = torch.zeros(len(pictures), device=pictures.device)
    for scale in SCALES:
        pair = F.avg_pool2d(pictures, scale), F.avg_pool2d(others, scale)
        loss += (sliced_distance(*pair, directions(PATCH, pictures.device)) + LEAST).log() / len(SCALES)
        if scale in COLOUR_SCALES:
            off = sliced_distance(*pair, directions(1, pictures.device))
            loss += (off + LEAST).log() / len(COLOUR_SCALES)
    return loss


def directions(side: int, device: torch.device) -> Tensor:
    """Random unit vectors of patches, `(DIRECTIONS, 3, side, side)`; larger ones are blind to means."""
    vectors = torch.randn(DIRECTIONS, 3, side, side, device=device)
    if side > 1:
        vectors -= vectors.mean((2, 3), keepdim=True)
    return vectors / vectors.flatten(1).norm(dim=1)[:, None, None, None]


def sliced_distance(pictures: Tensor, others: Tensor, vectors: Tensor) -> Tensor:
    """Mean absolute difference `(B,)` of the values along each vector in their order, `(B, C, H, W)` both."""
    values, wanted = (F.conv2d(each, vectors).flatten(2) for each in (pictures, others))
    if values.shape[2] > POSITIONS:
        at = torch.randperm(values.shape[2], device=values.device)[:POSITIONS]
        values, wanted = values[..., at], wanted[..., at]
    return (values.sort(2).values - wanted.sort(2).values).abs().mean((1, 2))
