"""What the paper's two ideas bring to nano: `python -m training.ablate`, at 20 minutes of one core a run.

Each run starts from the transformer and the text encoders of `--init`, with a style path that knows nothing,
and trains as `training.train` does, without guidance. `RUNS` says what each leaves out:

    all                     style alignment (`training.style`) for a quarter of the time, then all together
    no style alignment      everything together from the start
    no mixed pairs          the style picture is the one to be drawn, not another subject's
    one path                the style picture enters as the content does, as latents beside the noise

Two runs at a time; each goes on where it stopped. Then a table: squared error of the velocity at sigma 0.95
on unseen looks, and the scores of `training.evaluate` on the pictures of the tests, drawn without guidance.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import CACHE
from training.evaluate import METRICS, SMALL, STEPS, load_small, overall, score
from training.judges import load_judges
from training.latents import as_encoded, encode_pictures, unit_normal
from training.loop import autocast, averaged_weights, launch
from training.models import NANO, SHIFT, build_style_path
from training.pool import PICTURES, POOL
from training.style import train as align
from training.train import (
    SLIDER,
    TOKENIZERS,
    Nano,
    Shard,
    _as_style,
    encoder_weights,
    prepare_tokenizers,
    train,
    unpacked,
)
from uso.model.geometry import pack_latents
from uso.model.scheduler import USOFlowMatchEulerScheduler

FOLDER = CACHE / "ablation"
STYLE_CHECKPOINT = FOLDER / "style.pt"
UNSEEN = 96  # pictures whose velocity is measured
SIGMA = 0.95


class Unaligned(Nano):
    """Starts without a style path."""

    def load_exported(self, folder: Path) -> None:
        super().load_exported(folder)
        torch.manual_seed(0)
        for name, module in build_style_path().items():
            self.conditioning[name].load_state_dict(module.state_dict())


class Aligned(Unaligned):
    """Starts from an aligned style path."""

    def load_exported(self, folder: Path) -> None:
        super().load_exported(folder)
        self.load_state_dict(encoder_weights(STYLE_CHECKPOINT), strict=False)


class OnePath(Nano):
    """Takes style pictures as latents `(B, S, 16, h, w)`, and puts them where content goes."""

    def encode_style(self, pictures: Tensor) -> None:
        """No tokens: SigLIP sees nothing."""

    def references(self, content: Tensor | None, style: Tensor | None) -> list[Tensor]:
        return super().references(content, style) + ([] if style is None else list(style.unbind(1)))


class SamePictures(Shard):
    """The look of a picture is told by the picture itself."""

    def siblings(self, row: int, rng: np.random.Generator, count: int) -> list[int]:
        return [row] * count


class LatentStyles(Shard):
    """Style pictures are latents."""

    def random_style(self, row: int, rng: np.random.Generator, same: float) -> tuple[Tensor, bool]:
        return unit_normal(self.target[self.siblings(row, rng, 1)[0]]), True


RUNS: dict[str, tuple[type[Nano], type[Shard]]] = {
    "all": (Aligned, Shard),
    "no style alignment": (Unaligned, Shard),
    "no mixed pairs": (Aligned, SamePictures),
    "one path": (OnePath, LatentStyles),
}


def checkpoint_of(name: str) -> Path:
    return FOLDER / f"{name.replace(' ', '-')}.pt"


def run(name: str, *, minutes: float, init: Path) -> None:
    """One of RUNS, from where it stopped."""
    nano, shard = RUNS[name]
    left = minutes * (0.75 if nano is Aligned else 1)
    launch(train, left, 16, 1e-3, 1.0, init, checkpoint_of(name), 0, False, nano, shard, processes=1, seed=0)


def velocity_at(nano: Nano, latents: Tensor, sigma: Tensor, content: Tensor, style: Tensor) -> Tensor:
    """Velocity `(B, N, 64)` at one sigma, without guidance and words."""
    count = len(latents)
    with autocast():
        return nano(
            latents,
            sigma.expand(count),
            torch.full((count,), SLIDER[0]),
            content=content,
            style=style,
            prompts=[""] * count,
        ).float()


def draw(nano: Nano, latents: Tensor, *, content: Tensor, style: Tensor) -> Tensor:
    """Latents `(B, 16, h, w)` as the pipeline draws them from noise of their shape: no guidance, no words."""
    scheduler = USOFlowMatchEulerScheduler()
    scheduler.set_timesteps(STEPS, mu=SHIFT)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        velocity = velocity_at(nano, latents, sigma, content, style)
        latents = scheduler.step(unpacked(velocity, like=latents), t, latents, return_dict=False)[0]
    return latents


def as_styles(nano: Nano, pictures: np.ndarray, latents: Tensor) -> Tensor:
    """Style pictures uint8 `(B, 128, 128, 3)`, or for one path their latents: `(B, 1, ...)`."""
    if isinstance(nano, OnePath):
        return latents[:, None]
    return torch.stack([_as_style(picture) for picture in pictures])[:, None]


def measure(name: str) -> dict[str, float]:
    """The scores of a finished run."""
    nano = RUNS[name][0](TOKENIZERS)
    nano.load_state_dict(averaged_weights(checkpoint_of(name)))

    def encode(pictures: np.ndarray) -> Tensor:
        return unit_normal(encode_pictures(nano.vae, pictures))

    unseen = POOL / "looks-0000"
    rows = PICTURES * np.arange(UNSEEN)
    content, target = (np.load(unseen / f"{kind}.npy", mmap_mode="r")[rows] for kind in ("content", "target"))
    styles = np.load(unseen / "target.npy", mmap_mode="r")[rows + 1]
    clean = encode(target)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        noisy = torch.lerp(clean, noise, SIGMA)
        told = as_styles(nano, styles, encode(styles))
        velocity = velocity_at(nano, noisy, torch.tensor(SIGMA), encode(content), told)
    error = F.mse_loss(velocity, pack_latents(noise - clean)).item()

    judges, scores = load_judges(), {}
    start = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for name_of_set, examples in load_small().items():
        told = as_styles(nano, examples.style, encode(examples.style))
        content = encode(examples.content)
        with torch.inference_mode():
            drawn = draw(nano, start.expand_as(content), content=content, style=told)
            pixels = nano.vae.decode(as_encoded(drawn), return_dict=False)[0].clamp(-1, 1)
        pictures = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        scores[name_of_set] = {"nano": score(judges, pictures, examples)}
    return overall(scores, SMALL)["nano"] | {"error": error}


def main(names: Sequence[str], minutes: float, init: Path) -> None:
    """Train and measure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepare_tokenizers(init)
    if any(RUNS[name][0] is Aligned for name in names):
        launch(align, minutes / 4, 64, 2e-3, STYLE_CHECKPOINT, 0, processes=1, seed=0)
    with ThreadPool(2) as pool:
        pool.map(partial(run, minutes=minutes, init=init), names, chunksize=1)
    print(f"| run | error | {' | '.join(METRICS)} |\n{'|---' * (2 + len(METRICS))}|")
    for name in names:
        scores = measure(name)
        print(f"| {name} | {scores['error']:.3f} | {' | '.join(f'{scores[m]:.2f}' for m in METRICS)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], default=list(RUNS))
    parser.add_argument("--minutes", type=float, default=20, help="each (default 20)")
    parser.add_argument("--init", type=Path, default=NANO, help="diffusers folder to start from")
    a = parser.parse_args()
    main(a.runs, a.minutes, a.init)
