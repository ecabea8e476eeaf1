"""Every mode beside the lossless one: `python benchmarks/modes.py`.

The same pictures in each mode that the device has: seconds, expected and, on CUDA, measured peak of its
memory, and the PSNR to the pictures of the first. Prints a table for people; the last line is JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uso.model.checkpoints import load_pipeline
from uso.model.devices import choose_device, memory_modes
from uso.model.modes import GB, Quantization
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
    results: list[dict[str, Any]] = []
    print(f"{args.model}, {args.side}x{args.side}, {args.steps} steps, {len(works(args))} pictures")
    print(f"{'mode':<20} {'seconds':>8} {'expected GB':>12} {'peak GB':>8} {'lowest PSNR':>12}")
    for memory, quantization, turbo in rows:
        pipe = load_pipeline(args.model, quantization=quantization)
        device = Device(pipe, device=args.device, memory=memory, turbo=turbo)
        drawn = [draw(device, work) for work in works(args)]
        lossless = lossless or drawn
        name = " ".join([memory, *[quantization] * (quantization != "none"), *["turbo"] * turbo])
        result = {
            "mode": name,
            "seconds": statistics.median(sum(one.seconds.values()) for one in drawn),
            "expected_bytes": device.demand(
                works(args)[0], {"content_image": (512, 512), "style": (1, 1)}
            ).memory,
            "peak_bytes": max((one.peak or 0 for one in drawn), default=0) or None,
            "psnr": min(map(distance, drawn, lossless)),
        }
        peak = f"{result['peak_bytes'] / GB:.2f}" if result["peak_bytes"] else "-"
        print(f"{name:<20} {result['seconds']:>8.1f} {result['expected_bytes'] / GB:>12.2f} {peak:>8} "
              f"{result['psnr']:>9.1f} dB", flush=True)  # fmt: skip
        results.append(result)
    print(
        json.dumps({"benchmark": "modes", "model": args.model, "results": results}).replace(
            "Infinity", "null"
        )
    )


if __name__ == "__main__":
    main()
