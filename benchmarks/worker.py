"""A process that draws pictures when told to: one line of JSON in, one out. Knows neither package."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import Request


class Clock:
    """Marks of one picture: seconds of each phase, the device awaited at each mark."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        if name not in self.marks:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.marks[name] = time.perf_counter()

    def phases(self) -> dict[str, float]:
        begin, denoise, decode, end = (self.marks[name] for name in ("begin", "denoise", "decode", "end"))
        return {"encode": denoise - begin, "denoise": decode - denoise, "decode": end - decode}


class CountOps(TorchDispatchMode):
    """Counts the aten operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


Draw = Callable[[Request, Clock], tuple[Image.Image, Tensor]]


def take_stdout() -> TextIO:
    """The standard output for answers alone; what else is printed from now on goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(
    answers: TextIO,
    draw: Draw,
    *,
    device: str,
    forget: Callable[[], None],
    counting: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Answer until the input ends.

    Args:
        answers: see `take_stdout`.
        draw: a picture and its last latents; marks "denoise" and "decode".
        forget: makes all caches cold.
        counting: what it gives is entered while operations are counted.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(json.dumps({"device": name, "weights": memory(device)}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        if order["cold"]:
            forget()
        request = Request(order["steps"], seed=order["seed"])
        counter = CountOps()
        clock = Clock(device)
        reset_peak_memory(device)
        with counting() if order["count"] else nullcontext(), counter if order["count"] else nullcontext():
            clock.mark("begin")
            image, latents = draw(request, clock)
            clock.mark("end")
        if order["save"]:
            np.savez(order["save"], image=np.array(image), latents=latents.float().cpu().numpy())
        answer = {"phases": clock.phases(), "peak": peak_memory(device), "ops": counter.count}
        print(json.dumps(answer), file=answers)


def memory(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def reset_peak_memory(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man proc_pid_clear_refs


def _status(field: str) -> int:
    """A line of this process's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
