"""Train the nano autoencoder: `python -m training.vae --minutes 30`. Resumes from its checkpoint.

Loss: absolute difference of pixels, of their gradients at three scales (edges and texture), and a weak pull
of the latents towards a unit normal distribution.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training.data import CACHE
from training.loop import Run, averaged_weights, data_rng, device, kernels_by_muon, launch, training_options
from training.models import NANO, build_vae
from training.pool import POOL

CHECKPOINT = CACHE / "vae.pt"
KL_WEIGHT = 1e-3
LOGVAR_RANGE = (-12.0, 4.0)


def draw_crops(shards: list[np.ndarray], rng: np.random.Generator, *, batch: int, size: int) -> Tensor:
    """`(batch, 3, size, size)` crops in [-1, 1], mirrored and turned, of shards of uint8 `(N, H, W, 3)`.

    One in eight gets its colours' signs, order or strength changed, which unseen looks will do.
    """
    crops = np.empty((batch, size, size, 3), np.float32)
    for crop in crops:
        shard = shards[rng.integers(len(shards))]
        picture = shard[rng.integers(len(shard))]
        y, x = (rng.integers(n - size + 1) for n in picture.shape[:2])
        part = picture[y : y + size, x : x + size].astype(np.float32) / 127.5 - 1
        part = np.rot90(part[:, :: rng.choice((-1, 1))], int(rng.integers(4)))
        if rng.random() < 0.125:
            part = part[..., rng.permutation(3)] * rng.choice((-1, 1), 3) * rng.uniform(0.5, 1)
        crop[:] = part
    return torch.from_numpy(crops).permute(
        0, 3, 1, 2
    )  # (B, H, W, 3) -> (B, 3, H, W), channels last in memory


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels plus L1 of horizontal and vertical differences at scales 1, 1/2 and 1/4."""
    difference = output - target
    loss = difference.abs().mean()
    for _ in range(3):
        loss = loss + (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()) / 2
        difference = F.avg_pool2d(difference, 2)
    return loss


def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents, each `(B, 16, H/8, W/8)`."""
    mean, logvar = vae.encoder(pixels).chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def psnr(output: Tensor, target: Tensor) -> float:
    """Decibels for pictures in [-1, 1], the mean over the batch."""
    return float((10 * torch.log10(4 / (output.clamp(-1, 1) - target).square().mean((1, 2, 3)))).mean())


def train(minutes: float, batch: int, lr: float, checkpoint: Path, seed: int) -> None:
    """One process's work."""
    folders = sorted(POOL.glob("train-*"))
    # Looks need more learning than plain pictures: two draws of three.
    shards = [
        np.load(path / name, mmap_mode="r")
        for path in folders
        for name in ("target.npy", "target.npy", "content.npy")
    ]
    vae = build_vae().to(device(), memory_format=torch.channels_last)
    run = Run(vae, kernels_by_muon(vae, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    while run.progress < 1:
        # Small crops give more steps; the last third learns whole pictures, as they will come.
        size = 64 if run.progress < 2 / 3 else 128
        target = draw_crops(shards, rng, batch=batch if size == 64 else batch // 4, size=size).to(device())
        mean, logvar = encode(vae, target)
        output = vae.decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        run.update(reconstruction_loss(output, target) + KL_WEIGHT * kl)
        run.show(f"{psnr(output.detach(), target):.2f} dB kl {kl.item():.2f}")


def load_vae() -> AutoencoderKL:
    """The checkpoint's averaged autoencoder; without one the shipped one, or at first a random one."""
    vae = build_vae()
    if CHECKPOINT.exists():
        vae.load_state_dict(averaged_weights(CHECKPOINT))
    elif (NANO / "vae").exists():
        shipped = AutoencoderKL.from_pretrained(NANO / "vae", dtype=torch.float32)
        vae.load_state_dict(shipped.state_dict())
        vae.register_to_config(  # not its folder, which an export would write down
            shift_factor=shipped.config.shift_factor, scaling_factor=shipped.config.scaling_factor
        )
    return vae.eval().requires_grad_(False)


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=30)
    parser.add_argument("--batch", type=int, default=16, help="64 px crops a process and step")
    a = parser.parse_args()
    launch(
        train,
        a.minutes,
        a.batch,
        a.lr,
        CHECKPOINT,
        a.seed,
        processes=a.processes,
        seed=a.seed,
    )
