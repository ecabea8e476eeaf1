"""Every mode of `uso.model.modes.TABLE`: time, memory, and how far its pictures are from those of `full`.

`python -m benchmarks.modes [--model nano] [--device cpu]`, or `--size full` for random weights of that size;
the last line is JSON. Each mode runs in a process of its own; rows that this device cannot have say so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import SIZES, write_folder
from benchmarks.ours import build
from benchmarks.worker import memory, peak_memory, reset_peak_memory
from uso import load_pipeline
from uso.images import open_image
from uso.model.devices import choose_device
from uso.model.modes import TABLE, Picture
from uso.serve.device import Device
from uso.serve.work import Drawn, Work
from uso.settings import Settings

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "assets" / "examples"
# subject, look, prompt: one picture each
CASES = (("fox", "halftone", ""), ("sailboat", "delft-tile", ""), ("fox", "pop-art", "a fox in a forest"))


# a row's name, its flags, and whether it needs CUDA: those of the table, and what small cards take
ROWS = {mode.name: (mode.flag, mode.needs == "CUDA") for mode in TABLE}
ROWS |= {f"staged {kind}": (f"--memory staged --quantize {kind}", True) for kind in ("int8", "int4")}


def settings_of(flags: str, *, model: str, device: str) -> Settings:
    """As its flags set them; where files lie is in the environment."""
    fields: dict[str, Any] = {"model": model, "device": device}
    for flag in flags.split("--")[1:]:
        name, *value = flag.split()
        fields[name] = value[0] if value else True
    return Settings(**fields)


def load(settings: Settings, size: str | None) -> Any:
    """The model of the settings, or random weights of one of SIZES."""
    if size is None:
        return load_pipeline(settings.model, settings=settings)
    device = choose_device(settings.device).type
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        write_folder(SIZES[size], Path(folder))
        return build(SIZES[size], Path(folder), device=device, dtype=dtype, quantization=settings.quantize)


def draw(pipe: Any, settings: Settings, *, steps: int, rounds: int, side: int, save: Path) -> dict[str, Any]:
    """All cases, the first of them once before that is timed; latents and pictures go into `save`."""
    device = Device(pipe, device=settings.device, memory=settings.memory, turbo=settings.turbo)
    kind = device.device.type
    examples = {name: open_image(EXAMPLES / f"{name}.jpg") for case in CASES for name in case[:2]}
    latents: list[Tensor] = []
    decode = pipe.decode

    def kept_decode(last: Tensor, **kwargs: Any) -> Tensor:
        latents.append(last.float().cpu())
        return decode(last, **kwargs)

    def once(case: tuple[str, str, str], seed: int) -> Drawn:
        subject, look, prompt = case
        work = Work(
            prompt=prompt,
            width=side,
            height=side,
            num_steps=steps,
            guidance=4.0,
            seed=seed,
            content_long_size=512,
            content_image=examples[subject],
            style_images=(examples[look],),
        )
        pipe.conditioning.clear()
        *_, drawn = device.run(work, lambda: False)
        assert isinstance(drawn, Drawn)
        return drawn

    pipe.decode = kept_decode
    once(CASES[0], 0)
    latents.clear()
    before = memory(kind)
    reset_peak_memory(kind)
    drawn = [once(case, seed) for seed, case in enumerate(CASES)]
    np.savez(save, latents=torch.cat(latents).numpy(), pictures=np.array([np.array(d.image) for d in drawn]))
    drawn += [once(case, seed) for _ in range(rounds - 1) for seed, case in enumerate(CASES)]
    return {
        "seconds": statistics.median(sum(d.seconds.values()) for d in drawn),
        "drawing_seconds": statistics.median(d.seconds["drawing"] for d in drawn),
        "weights_bytes": device.footprint.weights(device.memory),
        "expected_bytes": device.footprint.peak(device.memory, Picture(side, side), turbo=device.turbo),
        "memory_bytes": before,
        "peak_bytes": peak_memory(kind),
    }


def distance(full: Path, other: Path) -> dict[str, float]:
    """Relative error of the last latents, and the pictures' peak signal-to-noise ratio in dB; both means."""
    a, b = np.load(full), np.load(other)
    errors = [
        np.linalg.norm(x - y) / np.linalg.norm(x) for x, y in zip(a["latents"], b["latents"], strict=True)
    ]
    squares = (a["pictures"].astype(np.float64) - b["pictures"]) ** 2
    with np.errstate(divide="ignore"):
        ratios = 10 * np.log10(255**2 / squares.mean(axis=(1, 2, 3)))
    return {"latents": float(np.mean(errors)), "psnr": float(np.mean(ratios))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--size", choices=SIZES, help="random weights in place of a model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, help="in pixels; default: 512 for nano, else 1024")
    parser.add_argument("--only", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    side = args.side or (512 if args.model == "nano" and args.size != "full" else 1024)
    if args.only:
        settings = settings_of(ROWS[args.only][0], model=args.model, device=args.device)
        pipe = load(settings, args.size)
        row = draw(pipe, settings, steps=args.steps, rounds=args.rounds, side=side, save=args.save)
        print(json.dumps(row))
        return 0
    device = choose_device(args.device).type
    model = f"random weights of size {args.size}" if args.size else args.model
    print(f"{model}, {side}x{side}, {args.steps} steps, {device}: medians, caches cold")
    print(
        f"{'':12}{'s':>9}{'steps, s':>10}{'weights, MB':>13}{'peak, GB':>10}{'latents':>10}{'PSNR, dB':>10}"
    )
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, needs_cuda) in ROWS.items():
            if needs_cuda and device != "cuda":
                print(f"{name:12}  not measured: needs CUDA")
                continue
            save = Path(folder) / f"{name}.npz"
            command = [sys.executable, "-m", "benchmarks.modes", *sys.argv[1:]]
            out = subprocess.run(
                [*command, "--only", name, "--save", str(save)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            row = json.loads(out.splitlines()[-1]) | distance(Path(folder) / "full.npz", save)
            rows[name] = row
            print(
                f"{name:12}{row['seconds']:9.3f}{row['drawing_seconds']:10.3f}"
                f"{row['weights_bytes'] / 1e6:13.1f}{row['peak_bytes'] / 1e9:10.2f}"
                f"{row['latents']:10.1e}{row['psnr']:10.1f}"
            )
            row["psnr"] = None if row["psnr"] == float("inf") else row["psnr"]  # which JSON has not
    print(json.dumps({"model": model, "device": device, "side": side, "steps": args.steps, "modes": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
