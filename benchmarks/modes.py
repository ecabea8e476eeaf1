"""Every mode beside the lossless one: `python benchmarks/modes.py`.

The same pictures in each mode that the device has: seconds, expected and measured peak of its memory (on a
CPU: of the process's), and the PSNR to the pictures of the first. Prints a table for people; the last line is
JSON.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from uso.model.checkpoints import load_pipeline
from uso.model.devices import choose_device, memory_modes
from uso.model.modes import GB, Picture, Quantization
from uso.serve.device import Device
from uso.serve.work import Drawn, Work

EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
STYLES = ("halftone", "delft-tile")


def works(args: argparse.Namespace) -> list[Work]:
    content, *styles = (Image.open(EXAMPLES / f"{name}.jpg").convert("RGB") for name in ("fox", *STYLES))
    size = {"width": args.side, "height": args.side, "num_steps": args.steps, "guidance": 4.0}
    return [
        Work("a fox", **size, seed=seed, content_long_size=512, content_image=content, style_images=(style,))
        for seed, style in enumerate(styles)
    ]


def draw(device: Device, work: Work) -> Drawn:
    for event in device.run(work, cancelled=lambda: False):
        if isinstance(event, Drawn):
            return event
    raise AssertionError("no picture")


def distance(drawn: Drawn, lossless: Drawn) -> float:
    """PSNR in dB; infinite where they are the same."""
    difference = np.asarray(drawn.image, np.float64) - np.asarray(lossless.image, np.float64)
    square = float((difference**2).mean())
    return 10 * np.log10(255**2 / square) if square else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    memories = memory_modes(choose_device(args.device))
    rows: list[tuple[str, Quantization, bool]] = [(memory, "none", False) for memory in memories]
    rows += [(memories[-1] if len(memories) < 2 else "staged", kind, False) for kind in ("int8", "int4")]
    rows += [("full", "none", True)]
    lossless: list[Drawn] = []
    results = []
    print(f"{args.model}, {args.side}x{args.side}, {args.steps} steps, {len(works(args))} pictures")
    print(f"{'mode':<20} {'seconds':>8} {'expected GB':>12} {'peak GB':>8} {'lowest PSNR':>12}")
    for memory, quantization, turbo in rows:
        pipe = load_pipeline(args.model, quantization=quantization)
        device = Device(pipe, device=args.device, memory=memory, turbo=turbo)
        drawn = [draw(device, work) for work in works(args)]
        lossless = lossless or drawn
        name = " ".join([memory, *[quantization] * (quantization != "none"), *["turbo"] * turbo])
        seconds = statistics.median(sum(one.seconds.values()) for one in drawn)
        expected = device.footprint.peak(device.memory, Picture(args.side, args.side), turbo=turbo)
        peak = max(one.peak or 0 for one in drawn)
        psnr = min(map(distance, drawn, lossless))
        print(
            f"{name:<20} {seconds:>8.1f} {expected / GB:>12.2f} {peak / GB:>8.2f} {psnr:>9.1f} dB", flush=True
        )
        results.append(
            {"mode": name, "seconds": seconds, "expected_bytes": expected, "peak_bytes": peak, "psnr": psnr}
        )
    print(
        json.dumps({"benchmark": "modes", "model": args.model, "results": results}).replace(
            "Infinity", "null"
        )
    )


if __name__ == "__main__":
    main()
