"""Train the style path alone first: `python -m training.style --minutes 10`.

Style alignment, as USO trains its projector before the rest: SigLIP and projector learn, contrastively, which
pictures share a look and not a subject; and by a second head which share its drawing when one of them has
lost its colours, for colours alone tell most looks apart. Beside that, to tell a look (`training.tells`).
`training.train` starts from the result. Needs the pool.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import CACHE
from training.loop import Run, data_rng, device, launch, layers_by_muon, training_options
from training.models import STYLE_SIZE, build_style_path
from training.pool import PICTURES, POOL
from training.tells import Tells, to_be_told

CHECKPOINT = CACHE / "style.pt"
TEMPERATURE = 0.07
LEAST_CROP = 0.75  # of the side; a look is the same in any part of a picture
EMBEDDING = 128


class StylePath(nn.Module):
    """Style pictures to the tokens that the transformer reads, and these to one unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioning = build_style_path()
        projector: Any = self.conditioning["style_projector"]
        width = projector.config.hidden_size
        self.tells = Tells()
        self.look, self.drawing = (
            nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, EMBEDDING))
            for _ in range(2)
        )

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, 3, H, W)` in [-1, 1] to style tokens `(B, T, C)`; unit vectors `(B, EMBEDDING)` of the
        whole look and of its drawing.
        """
        hidden_states = self.conditioning["image_encoder"](pictures, output_hidden_states=True).hidden_states
        tokens = self.conditioning["style_projector"](hidden_states)
        levels = tokens.unflatten(1, (3, -1)).mean(2).flatten(1)  # (B, 3 * K, C) -> (B, 3 * C)
        return tokens, F.normalize(self.look(levels), dim=1), F.normalize(self.drawing(levels), dim=1)


class Shard:
    """Pictures of one shard of the pool, and what is to be told of their looks."""

    def __init__(self, folder: Path) -> None:
        self.pictures = np.load(folder / "target.npy", mmap_mode="r")
        looks = json.loads((folder / "looks.json").read_text())
        self.told = torch.from_numpy(np.stack([to_be_told(look) for look in looks]))


def random_view(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A random crop of a uint8 `(H, W, 3)` picture, `(STYLE_SIZE, STYLE_SIZE, 3)`."""
    side = round(min(picture.shape[:2]) * rng.uniform(LEAST_CROP, 1))
    top, left = (rng.integers(length - side + 1) for length in picture.shape[:2])
    crop = np.ascontiguousarray(picture[top : top + side, left : left + side])
    return cv2.resize(crop, (STYLE_SIZE, STYLE_SIZE), interpolation=cv2.INTER_AREA)


def without_colours(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A uint8 `(H, W, 3)` picture in greys of random contrast and brightness, maybe inverted."""
    grey = picture @ rng.dirichlet((2, 2, 2)) / 255
    grey = (grey - grey.mean()) / (grey.std() + 0.02) * rng.choice((-1, 1)) * rng.uniform(0.12, 0.35)
    grey = np.clip(255 * (grey + rng.uniform(0.3, 0.7)), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """Each vector of `first` `(B, E)` shall be nearest to its row of `second` `(B, E)`, and the reverse."""
    similar = first @ second.T / TEMPERATURE  # (B, B)
    rows = torch.arange(len(similar), device=similar.device)
    return (F.cross_entropy(similar, rows) + F.cross_entropy(similar.T, rows)) / 2


def found(first: Tensor, second: Tensor) -> float:
    """The share of `first` whose nearest in `second` is its own row."""
    nearest = (first @ second.T).argmax(1)
    return (nearest == torch.arange(len(first), device=first.device)).float().mean().item()


def train(minutes: float, looks: int, lr: float, checkpoint: Path, seed: int) -> None:
    """One process's work: three pictures of each of `looks` looks a step."""
    cv2.setNumThreads(1)
    model = StylePath().to(device())
    run = Run(model, layers_by_muon(model, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    shards = [Shard(path) for path in sorted(POOL.glob("train-*"))]
    right: np.ndarray | None = None
    while run.progress < 1:
        shard = shards[rng.integers(len(shards))]
        chosen = rng.choice(len(shard.told), min(looks, len(shard.told)), replace=False)
        rows = np.array([look * PICTURES + rng.choice(PICTURES, 3, replace=False) for look in chosen]).T
        views = [list(shard.pictures[rows[0]])]  # in its size and place, as it shall be told
        views += [[random_view(rng, shard.pictures[row]) for row in third] for third in rows[1:]]
        views[2] = [without_colours(rng, view) for view in views[2]]
        pixels = torch.from_numpy(np.concatenate(views) / np.float32(127.5) - 1).permute(0, 3, 1, 2)
        tokens, look, drawing = (vectors.chunk(3) for vectors in model(pixels.to(device())))
        loss = contrast_loss(look[0], look[1]) + contrast_loss(drawing[0], drawing[2])
        run.update(loss + model.tells.loss(tokens[0], shard.told[chosen].to(device())))
        now = np.array([found(look[0], look[1]), found(drawing[0], drawing[2])])
        right = now if right is None else 0.98 * right + 0.02 * now
        run.show(f"found look {right[0]:.1%} drawing {right[1]:.1%}")


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=10)
    parser.add_argument("--looks", type=int, default=64, help="looks a process and step")
    a = parser.parse_args()
    launch(train, a.minutes, a.looks, a.lr, CHECKPOINT, a.seed, processes=a.processes, seed=a.seed)
