"""Train the decoder on what nano draws: `python -m training.decoder --minutes 15 --lr 5e-4`.

Resumes from its checkpoint. The autoencoder has learned true pictures. What the transformer draws is a little
off: grounds come mottled, stripes wavy. Here the decoder learns to show the true picture all the same; the
encoder, and with it what the transformer has learned, stays. Needs the latents and an exported nano
(`--init`); `training.export` takes the result.
"""

from pathlib import Path

import torch
from torch import Tensor

from training.data import CACHE
from training.latents import as_encoded
from training.loop import Run, autocast, data_rng, device, kernels_by_muon, launch, training_options
from training.models import NANO, SHIFT
from training.train import TOKENIZERS, Batch, Nano, decibels, load_shards, prepare_tokenizers, unpacked
from training.vae import psnr, reconstruction_loss
from uso.model.scheduler import USOFlowMatchEulerScheduler

CHECKPOINT = CACHE / "decoder.pt"
STEPS, SLIDER = 6, 4.0
DRAWN_AT_ONCE = 24  # pictures
KEPT = 16  # batches of them, from which each step takes some pictures
USES = 3  # of each picture, about
TRUE = 0.25  # of the pictures: as the encoder sees them, not as they are drawn
PIXELS = {1: 0.2, 4: 0.2}  # the weights of decibels, by sides of squares


@torch.no_grad()
def draw(nano: Nano, batch: Batch) -> Tensor:
    """Latents of a batch's size, as the pipeline draws them in STEPS."""
    scheduler = USOFlowMatchEulerScheduler()
    scheduler.set_timesteps(STEPS, mu=SHIFT)
    latents = torch.randn_like(batch.target)
    slider = torch.full((len(latents),), SLIDER, device=latents.device)
    encoded = nano.encode(batch.style, batch.prompts)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        now = sigma.expand(len(latents)).to(latents.device)
        velocity = nano(latents, now, slider, **batch.conditions, encoded=encoded)
        latents = scheduler.step(unpacked(velocity, like=latents), t, latents, return_dict=False)[0]
    return latents


def train(minutes: float, size: int, lr: float, init: Path, checkpoint: Path, seed: int) -> None:
    """One process's work."""
    nano = Nano(TOKENIZERS).requires_grad_(False)
    nano.load_exported(init)
    nano = nano.to(device())
    decoder = nano.vae.decoder.requires_grad_(True)
    run = Run(decoder, kernels_by_muon(decoder, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    torch.manual_seed(int(rng.integers(2**31)))
    shards = [shard for shard in load_shards([], None) if shard.split == "train"]
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # latents drawn and true, pictures
    smooth: float | None = None
    while run.progress < 1:
        if run.step * size % (DRAWN_AT_ONCE * USES) < size:
            shard = shards[rng.integers(len(shards))]
            chosen = rng.choice(len(shard.target), DRAWN_AT_ONCE, replace=False).tolist()
            batch = shard.batch("content + style", chosen, rng).to(device())
            with autocast():
                kept = [*kept[1 - KEPT :], (draw(nano, batch).float(), batch.target, batch.pixels)]
        rows = torch.from_numpy(rng.choice(DRAWN_AT_ONCE, size, replace=False))
        drawn, encoded, target = (part[rows] for part in kept[rng.integers(len(kept))])
        true = torch.from_numpy(rng.random(size) < TRUE).to(device())
        latents = torch.where(true[:, None, None, None], encoded, drawn)
        with autocast():
            output = decoder(as_encoded(latents)).float()
        run.update(decibels(output - target, PIXELS).mean() + reconstruction_loss(output, target))
        if not true.all():
            now = psnr(output[~true].detach(), target[~true])
            smooth = now if smooth is None else 0.98 * smooth + 0.02 * now
            run.show(f"{smooth:.2f} dB")


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=15)
    parser.add_argument("--batch", type=int, default=8, help="pictures a process and step")
    parser.add_argument("--init", type=Path, default=NANO, help="the exported nano that draws")
    a = parser.parse_args()
    prepare_tokenizers(a.init)
    options = (a.minutes, a.batch, a.lr, a.init, CHECKPOINT, a.seed)
    launch(train, *options, processes=a.processes, seed=a.seed)
