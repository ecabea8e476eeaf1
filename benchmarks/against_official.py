"""Our pipeline against the official code: same weights, pictures, seed and device, drawn in turn.

`python -m benchmarks.against_official --official CHECKOUT [--device cuda] [--size tiny|mid|full]`; the last
line is JSON. Exit code 1 when the pictures differ.

Each runs in a process of its own (both packages are called `uso`), the LoRA merged in ours and beside the
weights in theirs, as each does. Both encode the content picture; the official code is told to take the
posterior's mean, for it samples it from the global generator. On a CPU both compute in float32, which
`benchmarks.official` brings it to, on CUDA in bfloat16.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks.models import SEED, SIZES, Size, write_folder
from uso.model.plans import transformer_plan
from uso.model.variants import DEV, with_numbers_of

ROOT = Path(__file__).parents[1]
PHASES = ("encode", "denoise", "decode", "total")
H100_FLOPS = 790e12  # a second, dense bfloat16, as reached by large products
# Largest distances of latents and of an 8-bit picture in float32. In bfloat16 the LoRA alone, merged or not,
# moves each product by .0024 (relative), and the random models' layers add that up.
LATENTS, LEVELS, RELATIVE = 1e-4, 1, 0.05


class Worker:
    """`benchmarks.official` or `benchmarks.ours` in its process."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._answer()

    def draw(
        self, steps: int, *, seed: int = SEED, cold: bool = True, count: bool = False, save: str = ""
    ) -> Any:
        order = {"steps": steps, "seed": seed, "cold": cold, "count": count, "save": save}
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self._answer()
        answer["phases"]["total"] = sum(answer["phases"].values())
        return answer

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"The process of {self.name} ended: its error is above.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


@dataclass
class Measured:
    """What one of the two showed: `drawn` with cold caches, `warm` a new seed on the same inputs."""

    ready: dict[str, Any]
    ops_step: int
    ops_once: int
    drawn: list[dict[str, Any]]
    warm: list[dict[str, Any]]

    def seconds(self, phase: str) -> float:
        return statistics.median(answer["phases"][phase] for answer in self.drawn)

    def peak(self) -> int:
        return max(answer["peak"] for answer in self.drawn)


def measure(
    open_worker: Callable[[str], Worker], *, steps: int, rounds: int, together: bool, folder: Path
) -> Any:
    """Both, each after a picture that is not timed; in turn, round by round, when both fit in the memory."""
    found: dict[str, Measured] = {}

    def begin(worker: Worker) -> None:
        worker.draw(steps, save=str(folder / f"{worker.name}.npz"))
        one, two = (worker.draw(n, count=True)["ops"] for n in (1, 2))
        found[worker.name] = Measured(worker.ready, two - one, 2 * one - two, [], [])

    def go_on(worker: Worker, turn: int) -> None:
        found[worker.name].drawn.append(worker.draw(steps))
        if worker.name == "ours":
            found["ours"].warm.append(worker.draw(steps, seed=SEED + 1 + turn, cold=False))

    if together:
        with open_worker("official") as official, open_worker("ours") as ours:
            for worker in (official, ours):
                begin(worker)
            for turn in range(rounds):
                for worker in (official, ours):
                    go_on(worker, turn)
    else:
        for name in ("official", "ours"):
            with open_worker(name) as worker:
                begin(worker)
                for turn in range(rounds):
                    go_on(worker, turn)
    return found


def compare(folder: Path) -> dict[str, float]:
    """Distances of the first pictures: largest in latents and in 8-bit levels, and relative in latents."""
    official, ours = (np.load(folder / f"{name}.npz") for name in ("official", "ours"))
    latents, levels = (official[key].astype(np.float64) - ours[key] for key in ("latents", "image"))
    return {
        "latents": float(np.abs(latents).max()),
        "relative": float(np.linalg.norm(latents) / np.linalg.norm(official["latents"])),
        "levels": int(np.abs(levels).max()),
    }


def agree(distances: Mapping[str, float], dtype: str) -> bool:
    if dtype == "float32":
        return distances["latents"] <= LATENTS and distances["levels"] <= LEVELS
    return distances["relative"] <= RELATIVE


def flops(size: Size, folder: Path) -> tuple[int, int]:
    """Of one step of ours, and of SigLIP on two style pictures, which the official code adds to each step."""
    with torch.device("meta"):
        transformer = transformer_plan(with_numbers_of(DEV, folder)).model
        width, height, content = (side // 16 for side in (*size.side, size.content_long_size))
        image = width * height + content**2
        text = 512 + 2 * 3 * size.style_tokens
        with FlopCounterMode(display=False) as step, torch.no_grad():
            transformer(
                hidden_states=torch.empty(1, image, size.flux["in_channels"]),
                encoder_hidden_states=torch.empty(1, text, size.flux["context_in_dim"]),
                pooled_projections=torch.empty(1, size.flux["vec_in_dim"]),
                timestep=torch.empty(1),
                guidance=torch.empty(1),
                img_ids=torch.empty(image, 3),
                txt_ids=torch.empty(text, 3),
            )
        siglip = SiglipVisionModel(SiglipVisionConfig(**size.siglip))
        pixels = torch.empty(2, 3, size.siglip["image_size"], size.siglip["image_size"])
        with FlopCounterMode(display=False) as style, torch.no_grad():
            siglip(pixels)
    return step.get_total_flops(), style.get_total_flops()


def report(found: dict[str, Measured], extra: dict[str, Any]) -> dict[str, Any]:
    """Prints the table; what it says, for the last line."""
    official, ours = found["official"], found["ours"]
    ratios = [
        b["phases"]["total"] / a["phases"]["total"] for a, b in zip(official.drawn, ours.drawn, strict=True)
    ]
    warm = statistics.median(answer["phases"]["total"] for answer in ours.warm)
    rows = [(phase, official.seconds(phase), ours.seconds(phase)) for phase in PHASES]
    print(f"{'':34}{'official':>10}{'ours':>10}{'ratio':>8}")
    for phase, a, b in rows:
        print(f"{phase + ', s':34}{a:10.3f}{b:10.3f}{b / a:8.2f}")
    print(
        f"{'new seed, same inputs (warm), s':34}{official.seconds('total'):10.3f}{warm:10.3f}"
        f"{warm / official.seconds('total'):8.2f}"
    )
    print(f"{'median ratio of the rounds':34}{'':20}{statistics.median(ratios):8.2f}")
    for name, a, b in (
        ("peak memory, GB", official.peak() / 1e9, ours.peak() / 1e9),
        ("memory before the picture, GB", official.ready["weights"] / 1e9, ours.ready["weights"] / 1e9),
    ):
        print(f"{name:34}{a:10.2f}{b:10.2f}{b / a:8.2f}")
    for name, a, b in (
        ("aten operations a step", official.ops_step, ours.ops_step),
        ("aten operations once a picture", official.ops_once, ours.ops_once),
    ):
        print(f"{name:34}{a:10d}{b:10d}{b / a:8.2f}")
    return extra | {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": {phase: {"official": a, "ours": b} for phase, a, b in rows},
        "warm_seconds": warm,
        "peak_bytes": {name: m.peak() for name, m in found.items()},
        "ops_step": {name: m.ops_step for name, m in found.items()},
        "ops_once": {name: m.ops_once for name, m in found.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="a checkout of bytedance/USO")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--steps", type=int, help="default: 25, mid 4")
    parser.add_argument("--rounds", type=int, help="pictures of each that are timed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by the device")
    args = parser.parse_args()
    if not (args.official / "uso" / "flux" / "pipeline.py").is_file():
        parser.error(f"--official: {args.official} is no checkout of bytedance/USO")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device")
    size = SIZES[args.size]
    steps, rounds = args.steps or size.steps, args.rounds or size.rounds
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(size, folder)
        a_step, siglip = flops(size, folder)

        def open_worker(name: str) -> Worker:
            checkout = [str(args.official.resolve())] if name == "official" else []
            return Worker(
                name, *checkout, str(folder), "--size", args.size, "--device", args.device, "--dtype", dtype
            )

        found = measure(open_worker, steps=steps, rounds=rounds, together=args.size != "full", folder=folder)
        distances = compare(folder)
    device = found["ours"].ready["device"]
    print(
        f"{args.size}, {steps} steps, {size.side[0]}x{size.side[1]}, {dtype}, {device}: "
        f"medians of {rounds} rounds, caches cold\n"
        f"{a_step / 1e9:.1f} GFLOP a step of ours; SigLIP on two pictures {siglip / a_step:.1%} of that"
    )
    same = agree(distances, dtype)
    print(
        f"{'The pictures agree' if same else 'THE PICTURES DIFFER'}: latents by {distances['latents']:.1e} "
        f"(relative {distances['relative']:.1e}), picture by {distances['levels']} of 255\n"
    )
    extra = {
        "size": args.size, "steps": steps, "rounds": rounds, "device": device, "dtype": dtype, "agree": same,
        "distances": distances, "flops_step": a_step,
    }  # fmt: skip
    result = report(found, extra)
    if "H100" in device:
        floor = steps * a_step / H100_FLOPS
        result["multiple_of_floor"] = {name: m.seconds("total") / floor for name, m in found.items()}
        print(f"{f'multiple of the floor, {floor:.2f} s':34}", end="")
        print("".join(f"{result['multiple_of_floor'][name]:10.2f}" for name in ("official", "ours")))
    print(json.dumps(result))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
