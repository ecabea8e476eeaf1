"""Train what rewards the right look and subject: `python -m training.reward --minutes 9`.

USO's style reward learning in small: a network tells from latents which pictures share a look, and which
subject they show. `training.train` rewards the transformer for predictions in which it finds the look and
the subject asked for. It learns from the training pool alone, apart from the style path and from the judges
of the evaluation.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import CACHE
from training.latents import LATENTS, unit_normal
from training.loop import (
    Run,
    autocast,
    averaged_weights,
    data_rng,
    device,
    kernels_by_muon,
    launch,
    training_options,
)
from training.pool import PICTURES, POOL
from training.style import TEMPERATURE, contrast_loss, found

CHECKPOINT = CACHE / "reward.pt"
EMBEDDING = 128
WIDTHS = (128, 192, 256, 256)
STRIDES = (1, 2, 1, 2)
NOISE = 0.3  # at most, on latents of variance 1, so that no small deviation decides
TOLD_BY = 4  # pictures of a look, whose mean vector stands for it


class Reward(nn.Module):
    """Unit-normal latents `(B, 16, 16, 16)` to look and subject, unit vectors `(B, EMBEDDING)`, and texture.

    The look is told from texture `(B, F)`: deviation and mean of each channel of each stage, normalized.

    `subjects`: how many there are, by row of the pool's `subjects.json`; each has a vector.
    """

    def __init__(self, subjects: int) -> None:
        super().__init__()
        stages, before = [], 16
        for width, stride in zip(WIDTHS, STRIDES, strict=True):
            convolution = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.stages = nn.ModuleList(stages)
        features = 2 * (16 + sum(WIDTHS))
        self.look = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, EMBEDDING))
        self.subject = nn.Sequential(nn.BatchNorm1d(16 * before), nn.Linear(16 * before, EMBEDDING))
        self.subjects = nn.Parameter(torch.randn(subjects, EMBEDDING))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = [latents.contiguous(memory_format=torch.channels_last)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        texture = torch.cat([part for m in maps for part in torch.std_mean(m.float(), (2, 3))], dim=1)
        texture = self.look[0](texture).float()
        shapes = maps[-1].float().flatten(1)  # (B, C, 4, 4) -> (B, C * 16)
        look, subject = self.look[1](texture).float(), self.subject(shapes).float()
        return F.normalize(look, dim=1), F.normalize(subject, dim=1), texture

    def describe_looks(self, latents: Tensor) -> Tensor:
        """Looks `(L, EMBEDDING)` from PICTURES neighbouring latents of each, `(L * PICTURES, 16, 16, 16)`."""
        told = latents.unflatten(0, (-1, PICTURES))[:, :TOLD_BY]
        return F.normalize(self(told.flatten(0, 1))[0].unflatten(0, told.shape[:2]).mean(1), dim=1)

    def look_loss(self, look: Tensor, looks: Tensor, right: Tensor) -> Tensor:
        """How far `look` `(B, E)` is from number `right` `(B,)` of `looks` `(L, E)`: `(B,)`."""
        return F.cross_entropy(look @ looks.T / TEMPERATURE, right, reduction="none")

    def subject_loss(self, subject: Tensor, right: Tensor) -> Tensor:
        """How far `subject` `(B, E)` is from subject number `right` `(B,)`: `(B,)`; 0 where that is -1."""
        similar = subject @ F.normalize(self.subjects, dim=1).T
        return F.cross_entropy(similar / TEMPERATURE, right, reduction="none", ignore_index=-1)


def train(minutes: float, looks: int, lr: float, checkpoint: Path, seed: int) -> None:
    """One process's work: two pictures of each of `looks` looks a step, and the same plain."""
    subjects = json.loads((POOL / "subjects.json").read_text())
    model = Reward(len(subjects)).to(device())
    run = Run(model, kernels_by_muon(model, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    shards = [
        (np.load(path / "target.npy", "r"), np.load(path / "content.npy", "r"), shown(path.name))
        for path in sorted(LATENTS.glob("train-*"))
    ]
    right: np.ndarray | None = None
    while run.progress < 1:
        target, content, names = shards[rng.integers(len(shards))]
        chosen = rng.choice(len(target) // PICTURES, min(looks, len(target) // PICTURES), replace=False)
        pairs = np.array([look * PICTURES + rng.choice(PICTURES, 2, replace=False) for look in chosen]).T
        rows = pairs.reshape(-1)
        latents = unit_normal(np.concatenate([target[rows], content[rows]])).to(device())
        strength = NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        shows = torch.from_numpy(np.tile(names[rows], 2)).to(device())
        with autocast():
            look, subject, _ = model(latents + strength * torch.randn_like(latents))
        first, second = look[: len(rows)].chunk(2)
        run.update(contrast_loss(first, second) + model.subject_loss(subject, shows).mean())
        with torch.no_grad():
            nearest = (subject @ F.normalize(model.subjects, dim=1).T).argmax(1)
        now = np.array([found(first, second), (nearest == shows).float().mean().item()])
        right = now if right is None else 0.98 * right + 0.02 * now
        run.show(f"found look {right[0]:.1%} subject {right[1]:.1%}")


def shown(shard: str) -> np.ndarray:
    """Which subjects a shard's pictures show, int64 `(N,)`."""
    rows: np.ndarray = np.load(POOL / shard / "subject.npy")
    return rows


def load_reward(checkpoint: Path) -> Reward:
    """The averaged network of a finished run, frozen; its normalization knows the last batches."""
    weights = averaged_weights(checkpoint)
    model = Reward(len(weights["subjects"]))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=10)
    parser.add_argument("--looks", type=int, default=64, help="looks a process and step")
    a = parser.parse_args()
    launch(train, a.minutes, a.looks, a.lr, CHECKPOINT, a.seed, processes=a.processes, seed=a.seed)
