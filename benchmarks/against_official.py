"""Our pipeline against the official code: same weights, pictures, seed and device, drawn in turn.

`python -m benchmarks.against_official --official CHECKOUT [--device cuda] [--size tiny|mid|full]`; the last
line is JSON. Exit code 1 when the pictures differ.

Each runs in a process of its own (both packages are called `uso`), the LoRA merged in ours and beside the
weights in theirs, as each does. Ours runs twice: as it is loaded, and with its blocks compiled, which takes
seconds to minutes and is not timed. Both encode the content picture; the official code is told to take the
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
from contextlib import ExitStack
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
OFFICIAL = "official"
# a column of the table: module, arguments
CONTENDERS: dict[str, tuple[str, ...]] = {
    OFFICIAL: ("official",),
    "ours": ("ours",),
    "ours, compiled": ("ours", "--compile"),
}
PHASES = ("encode", "denoise", "decode", "total")
H100_FLOPS = 790e12  # a second, dense bfloat16, as reached by large products
# Largest distances of latents and of an 8-bit picture in float32. In bfloat16 the LoRA alone, merged or not,
# moves each product by .0024 (relative), and the random models' layers add that up.
LATENTS, LEVELS, RELATIVE = 1e-4, 1, 0.05


class Worker:
    """`benchmarks.official` or `benchmarks.ours` in its process."""

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        self.name = name
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
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

    def warm_seconds(self) -> float:
        return statistics.median(answer["phases"]["total"] for answer in self.warm or self.drawn)

    def ratios(self, other: "Measured") -> list[float]:
        """Of the other's time, round by round."""
        totals = ([answer["phases"]["total"] for answer in m.drawn] for m in (self, other))
        return [a / b for a, b in zip(*totals, strict=True)]

    def peak(self) -> int:
        return max(answer["peak"] for answer in self.drawn)


def measure(
    open_worker: Callable[[str], Worker], *, steps: int, rounds: int, together: bool, folder: Path
) -> dict[str, Measured]:
    """All, each after a picture that is not timed; in turn, round by round, when all fit in the memory."""
    found: dict[str, Measured] = {}

    def begin(worker: Worker) -> None:
        worker.draw(steps, save=str(folder / f"{worker.name}.npz"))
        one, two = (worker.draw(n, count=True)["ops"] for n in (1, 2))
        found[worker.name] = Measured(worker.ready, two - one, 2 * one - two, [], [])

    def go_on(worker: Worker, turn: int) -> None:
        found[worker.name].drawn.append(worker.draw(steps))
        if worker.name != OFFICIAL:
            found[worker.name].warm.append(worker.draw(steps, seed=SEED + 1 + turn, cold=False))

    if together:
        with ExitStack() as stack:
            workers = [stack.enter_context(open_worker(name)) for name in CONTENDERS]
            for worker in workers:
                begin(worker)
            for turn in range(rounds):
                for worker in workers:
                    go_on(worker, turn)
    else:
        for name in CONTENDERS:
            with open_worker(name) as worker:
                begin(worker)
                for turn in range(rounds):
                    go_on(worker, turn)
    return found


def distances(folder: Path, name: str) -> dict[str, float]:
    """Of first pictures from the official one: largest in latents and 8-bit levels, relative in latents."""
    official, ours = (np.load(folder / f"{name}.npz") for name in (OFFICIAL, name))
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


def report(found: dict[str, Measured]) -> dict[str, Any]:
    """Prints the table; what it says, for the last line."""
    official = found[OFFICIAL]
    others = [m for name, m in found.items() if name != OFFICIAL]
    print(f"{'':32}{OFFICIAL:>10}" + "".join(f"{name:>15}{'ratio':>7}" for name in found if name != OFFICIAL))

    def row(name: str, value: Callable[[Measured], float], digits: int) -> None:
        cells = [f"{value(m):15.{digits}f}{value(m) / value(official):7.2f}" for m in others]
        print(f"{name:32}{value(official):10.{digits}f}" + "".join(cells))

    for phase in PHASES:
        row(f"{phase}, s", lambda m, phase=phase: m.seconds(phase), 3)  # type: ignore[misc]
    row("new seed, same inputs, s", lambda m: m.warm_seconds(), 3)
    row("peak memory, GB", lambda m: m.peak() / 1e9, 2)
    row("memory before the picture, GB", lambda m: m.ready["weights"] / 1e9, 2)
    row("aten operations a step", lambda m: m.ops_step, 0)
    row("aten operations once a picture", lambda m: m.ops_once, 0)
    ratios = {name: m.ratios(official) for name, m in found.items() if name != OFFICIAL}
    medians = {name: statistics.median(of_rounds) for name, of_rounds in ratios.items()}
    print(f"{'median ratio of the rounds':42}" + "".join(f"{ratio:22.2f}" for ratio in medians.values()))
    return {
        "ratio": medians,
        "ratios": ratios,
        **{
            name: {
                "seconds": {phase: m.seconds(phase) for phase in PHASES},
                "new_seed_seconds": m.warm_seconds(),
                "peak_bytes": m.peak(),
                "weights_bytes": m.ready["weights"],
                "ops_step": m.ops_step,
                "ops_once": m.ops_once,
            }
            for name, m in found.items()
        },
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
            module, *arguments = CONTENDERS[name]
            checkout = [str(args.official.resolve())] if name == OFFICIAL else []
            numbers = ["--size", args.size, "--device", args.device, "--dtype", dtype]
            return Worker(name, module, *checkout, str(folder), *numbers, *arguments)

        found = measure(open_worker, steps=steps, rounds=rounds, together=args.size != "full", folder=folder)
        apart = {name: distances(folder, name) for name in CONTENDERS if name != OFFICIAL}
    device = found[OFFICIAL].ready["device"]
    print(
        f"{args.size}, {steps} steps, {size.side[0]}x{size.side[1]}, {dtype}, {device}: "
        f"medians of {rounds} rounds, caches cold\n"
        f"{a_step / 1e9:.1f} GFLOP a step of ours; SigLIP on two pictures {siglip / a_step:.1%} of that"
    )
    same = all(agree(of_one, dtype) for of_one in apart.values())
    print("The pictures agree:" if same else "THE PICTURES DIFFER:")
    for name, of_one in apart.items():
        print(
            f"  {name}: latents by {of_one['latents']:.1e} (relative {of_one['relative']:.1e}), picture by "
            f"{of_one['levels']} of 255"
        )
    result = report(found)
    if "H100" in device:
        floor = steps * a_step / H100_FLOPS
        result["multiple_of_floor"] = {name: m.seconds("total") / floor for name, m in found.items()}
        print(f"multiple of the floor, {floor:.2f} s: {result['multiple_of_floor']}")
    numbers = {
        "size": args.size, "steps": steps, "rounds": rounds, "device": device, "dtype": dtype, "agree": same,
        "distances": apart, "flops_step": a_step,
    }  # fmt: skip
    print(json.dumps(numbers | result))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
