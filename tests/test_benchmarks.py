"""The benchmarks run at their smallest, and compare what they say they compare.

USO_OFFICIAL names a checkout of the official code; without it the comparison itself is skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import against_official, official, ours
from benchmarks.models import FULL, SIZES, picture, random_tensor, write_folder
from benchmarks.modes import ROWS, settings_of
from uso.images import prepare_content
from uso.model.modes import TABLE

ROOT = Path(__file__).parents[1]
CHECKOUT = os.environ.get("USO_OFFICIAL")


def run(module: str, *arguments: str) -> Any:
    """What a benchmark says in its last line."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_full_size_has_the_names_and_shapes_of_the_published_files(tmp_path: Path) -> None:
    write_folder(FULL, tmp_path)
    bytes_in_bf16 = 0
    for name in ("flux1-dev", "ae", "dit_lora", "projector"):
        published = json.loads((ROOT / f"tests/full-size-keys/{name}.json").read_text(encoding="utf-8"))
        shapes = ours.shapes_of(tmp_path / f"{name}.safetensors", FULL)
        assert {key: list(shape) for key, shape in shapes.items()} == published
        bytes_in_bf16 += 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    t5 = ours.shapes_of(tmp_path / "t5", FULL)
    assert 2 * sum(int(np.prod(shape)) for shape in t5.values()) == pytest.approx(9.5e9, rel=0.01)
    assert bytes_in_bf16 == pytest.approx(23.8e9 + 0.48e9 + 0.17e9, rel=0.01)


@pytest.mark.parametrize("name", SIZES)
def test_siglip_has_the_share_of_the_full_model_or_less(name: str, tmp_path: Path) -> None:
    """At a larger share its repetition alone would decide the ratio."""
    write_folder(SIZES[name], tmp_path)
    step, siglip = against_official.flops(SIZES[name], tmp_path)
    assert siglip / step < 0.03
    if name == "full":
        assert step == pytest.approx(103.0e12, rel=0.01)


def test_random_weights_depend_on_their_name_alone() -> None:
    def make(name: str) -> torch.Tensor:
        return random_tensor(name, (64, 64), device="cpu", dtype=torch.float32)

    assert torch.equal(make("a.weight"), make("a.weight"))
    assert torch.equal(make("text_model.a.weight"), make("a.weight"))
    assert not torch.equal(make("b.weight"), make("a.weight"))
    assert make("a.weight").std() == pytest.approx(1 / 8, rel=0.1)


def test_the_stand_in_gives_the_pixels_that_our_pipeline_gives(tmp_path: Path) -> None:
    write_folder(SIZES["tiny"], tmp_path)
    pipe = ours.build(SIZES["tiny"], tmp_path, device="cpu", dtype=torch.float32)
    prepared = prepare_content(picture("content"), 96)
    stand_in = (official.to_tensor(prepared) * 2 - 1)[None]
    torch.testing.assert_close(stand_in, pipe.image_processor.preprocess(prepared), rtol=0, atol=0)


def test_against_official_wants_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["against_official", "--official", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        against_official.main()
    assert end.value.code == 2
    assert "no checkout" in capsys.readouterr().err


@pytest.mark.skipif(CHECKOUT is None, reason="USO_OFFICIAL is not set")
def test_against_official() -> None:
    assert CHECKOUT is not None
    said = run("against_official", "--official", CHECKOUT, "--steps", "2", "--rounds", "1")
    assert said["agree"]
    assert said["ours"]["ops_step"] < 0.65 * said["official"]["ops_step"]


def test_cost() -> None:
    errors = run("cost", "--device", "cpu", "--pictures", "1")["errors"]
    assert all(error >= 0 for row in errors.values() for error in row.values())


def test_server() -> None:
    said = run("server", "--tasks", "3", "--clients", "2", "--steps", "1")
    for part in ("engine", "server"):
        assert said[part]["in_order"]
        assert said[part]["tasks_a_second"] > 0


def test_modes() -> None:
    said = run("modes", "--device", "cpu", "--steps", "1", "--rounds", "1")["modes"]
    assert said.keys() == {mode.name for mode in TABLE if mode.needs != "CUDA"}
    assert settings_of(ROWS["staged int4"][0], model="nano", device="cpu").quantize == "int4"
    assert said["full"]["latents"] == 0
    assert 0 < said["int8"]["latents"] < said["int4"]["latents"]
    assert said["int4"]["weights_bytes"] < said["int8"]["weights_bytes"] < said["full"]["weights_bytes"]


def test_a_mode_of_random_weights(tmp_path: Path) -> None:
    size = ["--size", "tiny", "--device", "cpu", "--steps", "1", "--rounds", "1", "--side", "96"]
    saved = tmp_path / "int8.npz"
    said = run("modes", *size, "--only", "int8", "--save", str(saved))
    assert said["peak_bytes"] > said["weights_bytes"] > 0
    assert np.load(saved)["pictures"].shape == (3, 96, 96, 3)
