"""What a picture will cost: seconds and peak memory, learned from the pictures before it on the same device.

Nothing is promised before it was measured: no seconds before the first picture. Imports no torch.
"""

import itertools
import json
import logging
import os
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uso.serve.work import Phase

logger = logging.getLogger(__name__)

RUNS_KEPT = 24  # of one device and model: what it took long ago tells little
DEVICES_KEPT = 32
ROUNDS = 20  # of reweighting, until the sum of absolute errors stands
RANK_TOLERANCE = 1e-3  # runs that differ by less cannot tell two features apart


@dataclass(frozen=True)
class Demand:
    """What a picture asks of the model.

    Args:
        steps: how often the transformer runs.
        tflop: 10^12 floating-point operations a step.
        pictures: how many pictures are encoded.
        megapixels: what is decoded, at the size the model draws.
        memory: bytes at the peak, by the model's configuration (`uso.model.modes`).
    """

    steps: int
    tflop: float
    pictures: int
    megapixels: float
    memory: int


@dataclass(frozen=True)
class Cost:
    """`seconds` of each phase, None before the first picture; `memory`: bytes at the peak."""

    phases: dict[Phase, float] | None
    memory: int

    @property
    def seconds(self) -> float | None:
        return None if self.phases is None else sum(self.phases.values())


@dataclass(frozen=True)
class _Run:
    """One picture: what it asked for and what it took; `peak` in bytes, None where nobody measures it."""

    demand: Demand
    seconds: dict[Phase, float]
    peak: int | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "_Run":
        return cls(Demand(**row["demand"]), row["seconds"], row["peak"])


def cost_text(costs: Sequence[Cost]) -> str:
    """What pictures cost one after another, in words."""
    memory = f"{max(cost.memory for cost in costs) / 1e9:.1f} GB of memory"
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    if len(seconds) < len(costs):
        return f"{memory}; how long it takes is known after the first picture"
    return f"about {seconds_text(sum(seconds))}, {memory}"


def seconds_text(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# What the seconds of a phase grow with; the first alone when the runs cannot tell them apart
FEATURES: dict[Phase, Callable[[Demand], Sequence[float]]] = {
    "encoding": lambda demand: (1.0, demand.pictures),
    "drawing": lambda demand: (demand.steps * demand.tflop, demand.steps),
    "decoding": lambda demand: (demand.megapixels, 1.0),
}


class Calibration:
    """What pictures took on the devices that were used, kept on the disk.

    Args:
        path: a JSON file, which several processes may add to. An unreadable one is begun anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known = self._read()
        self._weights: dict[tuple[str, Phase], np.ndarray] = {}

    def predict(self, device: str, demand: Demand, in_use: int = 0) -> Cost:
        """What a picture will take; of its encoding the usual, whether or not its inputs are known already.

        `device` names all that it depends on beside the demand: the device, the model, how it is placed.
        `in_use`: bytes there now, which the peak will not be below.
        """
        with self._lock:
            runs = self._known.get(device, [])
            phases: dict[Phase, float] | None = None
            if runs:
                phases = {
                    phase: float(self._fitted(device, phase) @ of(demand)) for phase, of in FEATURES.items()
                }
        beyond = [run.peak - run.demand.memory for run in runs if run.peak is not None] or [0]
        return Cost(phases, max(demand.memory + round(statistics.median(beyond)), in_use))

    def learn(self, device: str, demand: Demand, seconds: Mapping[Phase, float], peak: int | None) -> None:
        """Take note of what a picture took, here and on the disk; `peak` in bytes, None if nobody knows."""
        with self._lock:
            self._known = self._read()
            runs = [*self._known.pop(device, []), _Run(demand, dict(seconds), peak)]
            self._known[device] = runs[-RUNS_KEPT:]  # the newest last
            self._known = dict([*self._known.items()][-DEVICES_KEPT:])
            self._weights.clear()
            self._write()

    def _fitted(self, device: str, phase: Phase) -> np.ndarray:
        if (device, phase) not in self._weights:
            runs = self._known[device]
            self._weights[device, phase] = fit(
                [FEATURES[phase](run.demand) for run in runs],
                [run.seconds[phase] for run in runs],
                [sum(run.seconds.values()) for run in runs],
            )
        return self._weights[device, phase]

    def _read(self) -> dict[str, list[_Run]]:
        try:
            known = json.loads(self.path.read_text())
            return {device: [_Run.of(row) for row in rows] for device, rows in known.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be used and is begun anew: %s", self.path, error)
            return {}

    def _write(self) -> None:
        known = {device: [asdict(run) for run in runs] for device, runs in self._known.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = self.path.with_suffix(f".{os.getpid()}.part")  # what a full disk leaves is written over
            part.write_text(json.dumps(known))
            part.replace(self.path)
        except OSError as error:  # a full disk must not cost the picture
            logger.warning("%s cannot be written: %s", self.path, error)


def fit(features: Sequence[Sequence[float]], values: Sequence[float], scales: Sequence[float]) -> np.ndarray:
    """Weights, none negative, with the least sum of `|features @ weights - values| / scales`.

    Absolute errors, not squares: the first picture of a process, or one beside other work, is an outlier.
    `features` (runs, F); the weights `(F,)` of features that the runs cannot tell apart go to the first.
    """
    rows, wanted = np.array(features) / np.array(scales)[:, None], np.array(values) / np.array(scales)
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), size):
            columns = rows[:, chosen]
            if np.linalg.matrix_rank(columns, tol=RANK_TOLERANCE * np.abs(columns).max()) < size:
                continue
            trust = np.ones(len(rows))
            for _ in range(ROUNDS):
                weights = np.linalg.lstsq(columns * trust[:, None], wanted * trust, rcond=None)[0]
                errors = np.abs(columns @ weights - wanted)
                trust = 1 / np.sqrt(np.maximum(errors, 1e-4))
            if weights.min() >= 0 and errors.sum() < least - 1e-9:
                best, least = np.zeros(rows.shape[1]), errors.sum()
                best[list(chosen)] = weights
    return best
