"""Encode the pool with the trained autoencoder: `python -m training.latents`. Skips what is done.

Writes `CACHE/latents/<shard>/<kind>.npy`, float16 `(N, 16, h/8, w/8)` as the encoder gives them: "target" (in
a look) and "content" (plain). `CACHE/latents/scale.json` has the factors that make them unit normal.
"""

import argparse
import json

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from training.data import CACHE
from training.loop import autocast, device, launch
from training.pool import POOL, TRAINED
from training.vae import load_vae

LATENTS = CACHE / "latents"
BATCH = 16


def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Latent means of uint8 `(B, H, W, 3)`, float16 `(B, 16, H/8, W/8)`."""
    pixels = torch.from_numpy(pictures / np.float32(127.5) - 1).permute(0, 3, 1, 2).to(vae.device)
    # bfloat16 adds a noise of 0.6 % and takes half of the time
    with torch.inference_mode(), autocast():
        mean = vae.encoder(pixels).chunk(2, dim=1)[0]
    return mean.half().cpu().numpy()


def unit_normal(latents: np.ndarray | Tensor) -> Tensor:
    """Raw latents as the transformer sees them, float32."""
    scale = json.loads((LATENTS / "scale.json").read_text())
    raw = latents if isinstance(latents, Tensor) else torch.from_numpy(latents.astype(np.float32))
    return (raw - scale["shift_factor"]) * scale["scaling_factor"]


def as_encoded(latents: Tensor) -> Tensor:
    """Inverse of `unit_normal`."""
    scale = json.loads((LATENTS / "scale.json").read_text())
    return latents / scale["scaling_factor"] + scale["shift_factor"]


def encode_shard(vae: AutoencoderKL, name: str) -> None:
    """Write one shard's latents, whole or not at all."""
    source, part = POOL / name, LATENTS / f".{name}.part"
    part.mkdir(parents=True, exist_ok=True)
    for kind in ("target", "content"):
        pictures = np.load(source / f"{kind}.npy", mmap_mode="r")
        latents = [
            encode_pictures(vae, pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)
        ]
        np.save(part / f"{kind}.npy", np.concatenate(latents))
    part.rename(LATENTS / name)


def encode_pool() -> None:
    """One process's share of the shards."""
    vae = load_vae().to(device(), memory_format=torch.channels_last)
    names = sorted(path.name for split in TRAINED for path in POOL.glob(f"{split}-*"))
    for name in tqdm(
        names[dist.get_rank() :: dist.get_world_size()], disable=dist.get_rank() > 0, unit="shard"
    ):
        if not (LATENTS / name).exists():
            encode_shard(vae, name)


def write_scale() -> None:
    """Write the shift and the scale: a shipped autoencoder's own, else what makes a shard unit normal."""
    config = load_vae().config
    scale = {"shift_factor": config.shift_factor, "scaling_factor": config.scaling_factor}
    if config.scaling_factor == 1:
        first = min(LATENTS.glob("train-*"))
        arrays = [np.load(first / f"{kind}.npy").astype(np.float64).ravel() for kind in ("content", "target")]
        values = np.concatenate(arrays)
        scale = {"shift_factor": values.mean(), "scaling_factor": 1 / values.std()}
    (LATENTS / "scale.json").write_text(json.dumps(scale))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, help="default: the GPUs, or 2 without one")
    arguments = parser.parse_args()
    launch(encode_pool, processes=arguments.processes, seed=0)
    write_scale()
