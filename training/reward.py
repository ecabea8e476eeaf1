"""Train what rewards the right look: `python -m training.reward --minutes 8`.

USO's style reward learning in small: a network tells from latents which pictures share a look, and
`training.train` rewards the transformer for predictions that it finds in the look asked for. It learns
contrastively from the training pool alone, apart from the style path and from the judges of the evaluation.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from training.data import CACHE
from training.latents import LATENTS, unit_normal
from training.loop import Run, autocast, averaged_weights, data_rng, device, launch, layers_by_muon
from training.pool import PICTURES
from training.style import TEMPERATURE, contrast_loss, found

CHECKPOINT = CACHE / "reward.pt"
EMBEDDING = 128
NOISE = 0.3  # at most, on latents of variance 1, so that no small deviation decides
TOLD_BY = 4  # pictures of a look, whose mean vector stands for it


class LookReward(nn.Module):
    """Unit-normal latents `(B, 16, 16, 16)` to unit vectors `(B, EMBEDDING)`, near within a look."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SiglipVisionModel(
            SiglipVisionConfig(
                num_channels=16,
                image_size=16,
                patch_size=2,
                hidden_size=192,
                intermediate_size=576,
                num_hidden_layers=4,
                num_attention_heads=3,
                vision_use_head=False,
            )
        )
        self.head = nn.Sequential(nn.Linear(5 * 2 * 192, 256), nn.GELU(), nn.Linear(256, EMBEDDING))

    def forward(self, latents: Tensor) -> Tensor:
        levels = self.encoder(latents, output_hidden_states=True).hidden_states  # 5 of (B, 64, 192)
        parts = [part for level in levels for part in torch.std_mean(level.float(), dim=1)]
        return F.normalize(self.head(torch.cat(parts, dim=1)), dim=1)

    def describe_looks(self, latents: Tensor) -> Tensor:
        """Looks `(L, EMBEDDING)` from PICTURES neighbouring latents of each, `(L * PICTURES, 16, 16, 16)`."""
        told = latents.unflatten(0, (-1, PICTURES))[:, :TOLD_BY]
        return F.normalize(self(told.flatten(0, 1)).unflatten(0, told.shape[:2]).mean(1), dim=1)

    def loss(self, latents: Tensor, looks: Tensor, right: Tensor) -> Tensor:
        """How far latents `(B, 16, 16, 16)` are from look `right` `(B,)` among `looks` `(L, E)`: `(B,)`."""
        return F.cross_entropy(self(latents) @ looks.T / TEMPERATURE, right, reduction="none")


def train(minutes: float, looks: int, lr: float, checkpoint: Path, seed: int) -> None:
    """One process's work: two pictures of each of `looks` looks a step."""
    model = LookReward().to(device())
    run = Run(model, layers_by_muon(model, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    shards = [np.load(path / "target.npy", mmap_mode="r") for path in sorted(LATENTS.glob("train-*"))]
    right: float | None = None
    while run.progress < 1:
        shard = shards[rng.integers(len(shards))]
        chosen = rng.choice(len(shard) // PICTURES, min(looks, len(shard) // PICTURES), replace=False)
        rows = np.array([look * PICTURES + rng.choice(PICTURES, 2, replace=False) for look in chosen]).T
        latents = unit_normal(shard[rows.reshape(-1)]).to(device())
        strength = NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        with autocast():
            first, second = model(latents + strength * torch.randn_like(latents)).chunk(2)
        run.update(contrast_loss(first, second))
        now = found(first, second)
        right = now if right is None else 0.98 * right + 0.02 * now
        run.show(f"found {right:.1%}")


def load_reward(checkpoint: Path) -> LookReward:
    """The averaged network, frozen."""
    model = LookReward()
    model.load_state_dict(averaged_weights(checkpoint))
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--looks", type=int, default=64, help="looks a process and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, help="default: the GPUs, or 2 without one")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    launch(train, a.minutes, a.looks, a.lr, CHECKPOINT, a.seed, processes=a.processes, seed=a.seed)
