"""Seconds and memory are learned from what was measured, and from nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from uso.serve.cost import DEVICES_KEPT, RUNS_KEPT, Calibration, Demand

GB = 10**9


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return Calibration(tmp_path / "calibration.json")


def demand(steps: int = 25, tflop: float = 100.0, pictures: int = 2, megapixels: float = 1.0) -> Demand:
    return Demand(steps, tflop, pictures, megapixels, memory=17 * GB + round(tflop * 2e7))


def taken(asked: Demand, *, noise: float = 0.0, seed: int = 0) -> dict[str, float]:
    """What a device takes of 300 TFLOP/s, 4 ms of overhead a step, 50 ms a picture and a megapixel."""
    factor = 1 + noise * np.random.default_rng(seed).standard_normal(3)
    true = (0.02 + 0.05 * asked.pictures, asked.steps * (asked.tflop / 300 + 0.004), 0.05 * asked.megapixels)
    return dict(zip(("encoding", "drawing", "decoding"), (true * factor).tolist(), strict=True))


def test_nothing_is_said_of_seconds_before_the_first_picture(calibration: Calibration) -> None:
    cost = calibration.predict("gpu", demand())
    assert cost.seconds is None
    assert cost.memory == demand().memory


def test_three_pictures_foretell_others(calibration: Calibration) -> None:
    first = (demand(25, 100), demand(12, 75, pictures=1), demand(4, 40, megapixels=0.25))
    for seed, asked in enumerate(first):
        calibration.learn("gpu", asked, taken(asked, noise=0.02, seed=seed), asked.memory + GB)
    for asked in (demand(50, 103, pictures=3), demand(10, 60, pictures=0), demand(25, 150, megapixels=2.25)):
        cost = calibration.predict("gpu", asked)
        assert cost.seconds == pytest.approx(sum(taken(asked).values()), rel=0.06)
        assert cost.memory == asked.memory + GB
    assert calibration.predict("cpu", demand()).seconds is None
    assert Calibration(calibration.path).predict("gpu", demand()) == calibration.predict("gpu", demand())
    assert calibration.predict("gpu", demand(), in_use=90 * GB).memory == 90 * GB


def test_one_picture_foretells_more_steps(calibration: Calibration) -> None:
    calibration.learn("gpu", demand(), taken(demand()), None)
    phases = calibration.predict("gpu", demand(50)).phases
    assert phases is not None
    assert phases["drawing"] == pytest.approx(2 * taken(demand())["drawing"])


def test_a_slow_picture_among_usual_ones_counts_little(calibration: Calibration) -> None:
    for steps in (25, 12, 8, 50, 25):
        slow = 6.0 if steps == 8 else 1.0
        seconds = {phase: slow * value for phase, value in taken(demand(steps)).items()}
        calibration.learn("gpu", demand(steps), seconds, None)
    usual = sum(taken(demand(20)).values())
    assert calibration.predict("gpu", demand(20)).seconds == pytest.approx(usual, rel=0.1)


def test_two_processes_add_to_one_file(calibration: Calibration) -> None:
    other = Calibration(calibration.path)
    for one in (calibration, other, calibration):
        one.learn("gpu", demand(), taken(demand()), None)
    assert len(json.loads(calibration.path.read_text())["gpu"]) == 3


def test_the_file_stays_small_and_mends_itself(
    calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    path = calibration.path
    for device in range(DEVICES_KEPT + 2):
        calibration.learn(f"gpu {device}", demand(), taken(demand()), None)
    for _ in range(RUNS_KEPT):
        calibration.learn("gpu 5", demand(), taken(demand()), None)
    known = json.loads(path.read_text())
    assert len(known) == DEVICES_KEPT
    assert {len(runs) for runs in known.values()} == {1, RUNS_KEPT}
    for broken in ("{", "[]", '{"gpu": [{"demand": {"steps": 1}}]}', '{"gpu": [3]}'):
        path.write_text(broken)
        mended = Calibration(path)
        assert "begun anew" in caplog.text
        mended.learn("gpu", demand(), taken(demand()), None)
        assert Calibration(path).predict("gpu", demand()).seconds is not None
        caplog.clear()


def test_a_disk_that_takes_nothing_costs_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    calibration = Calibration(tmp_path / "file" / "calibration.json")
    calibration.learn("gpu", demand(), taken(demand()), None)
    assert "cannot be written" in caplog.text
    assert calibration.predict("gpu", demand()).seconds is not None
