"""The doctor, on the goldens' tiny official files and on this machine."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from uso import doctor
from uso.model import sources
from uso.settings import Settings

GOLDENS = Path(__file__).parent / "goldens" / "weights"
PARTS = ["transformer", "lora", "projector", "ae", "t5", "clip", "siglip"]


def look(source: Any, **values: Any) -> doctor.Report:
    return doctor.report(str(source), settings=Settings(_env_file=None, **values))  # type: ignore[call-arg]


@pytest.fixture(autouse=True)
def fresh_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, nothing downloaded, no token stored, memory and disk for a full model."""
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)
    monkeypatch.setattr(doctor, "cached", lambda part: None)
    monkeypatch.setattr(doctor, "hub_is_off", lambda: False)
    monkeypatch.setattr(sources, "get_token", lambda: None)
    memory = SimpleNamespace(total=64e9, available=60e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100e9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS, tmp_path / "weights", copy_function=shutil.copyfile))


def test_complete_folder_would_run(folder: Path) -> None:
    report = look(folder)
    assert report.exit_code == 0
    assert report.problems == []
    assert [row.name for row in report.rows] == PARTS
    assert {row.origin for row in report.rows} == {"file"}
    transformer = report.rows[0]
    assert transformer.path == folder / "flux1-dev.safetensors"
    assert transformer.size == transformer.path.stat().st_size
    assert "Non-Commercial" in transformer.licence
    text = str(report)
    for part in ("flux1-dev.safetensors", "Apache-2.0", "GB free", "in bfloat16 on", "Ready."):
        assert part in text


def test_no_tensor_is_read_and_it_is_quick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("uso.model.weights.Weights.tensors", fail)
    start = time.process_time()
    look(folder)
    assert time.process_time() - start < 3


def test_parameters_are_counted_as_the_models_have_them(folder: Path) -> None:
    counts = {row.name: row.parameters for row in look(folder).rows}
    in_file = sum(t.numel() for t in load_file(folder / "flux1-dev.safetensors").values())
    assert counts["transformer"] == in_file
    assert counts["lora"] == 0
    # the vision tower alone
    tensors = load_file(folder / "siglip" / "model.safetensors")
    assert counts["siglip"] == sum(
        t.numel() for name, t in tensors.items() if name.startswith("vision_model.")
    )


@pytest.mark.parametrize("gone", ["lora", "t5", "transformer"])
def test_missing_part_is_named_with_the_remedy(gone: str, folder: Path) -> None:
    file = {"lora": "dit_lora.safetensors", "t5": "t5", "transformer": "flux1-*"}[gone]
    for path in folder.glob(file):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = look(folder)
    assert report.exit_code == 1
    assert [row.name for row in report.rows if row.origin == "missing"] == [gone]
    assert "huggingface.co/" in report.problems[0]
    assert report.problems[0] in str(report)


def test_damaged_part_is_a_problem_of_its_own(folder: Path) -> None:
    tensors = load_file(folder / "dit_lora.safetensors")
    tensors.pop("double_blocks.0.processor.qkv_lora1.up.weight")
    save_file(tensors, folder / "dit_lora.safetensors")
    (folder / "ae.safetensors").write_bytes(b"GGUF" + bytes(8))
    (folder / "clip" / "vocab.json").unlink()
    report = look(folder)
    assert report.exit_code == 1
    assert [row.name for row in report.rows if row.problem] == ["lora", "ae", "clip"]
    for says in ("unpaired: double_blocks.0.processor.qkv_lora1.down.weight", "GGUF", "vocab.json"):
        assert says in str(report)


def test_without_siglip_nothing_is_said_of_the_projectors_shape(folder: Path) -> None:
    shutil.rmtree(folder / "siglip")
    report = look(folder)
    assert [row.name for row in report.rows if row.problem] == ["projector", "siglip"]


def test_gated_model_without_token_would_not_run() -> None:
    report = look("flux-dev")
    assert report.exit_code == 1
    origins = {row.name: row.origin for row in report.rows}
    assert origins == dict.fromkeys(PARTS, "missing") | dict.fromkeys(["lora", "projector", "siglip"], "hub")
    assert "FLUX_DEV" in str(report)
    assert "accept its licence" in str(report)
    assert "HF_TOKEN" in str(report)


@pytest.mark.parametrize(("source", "token"), [("flux-dev", "hf_secret"), ("flux-schnell", None)])
def test_what_can_be_downloaded_counts_as_there(source: str, token: str | None) -> None:
    report = look(source, hf_token=token)
    assert report.exit_code == 0
    assert "after a download of 37.9 GB" in report.plan
    assert "36 GB of weights" in report.plan or "35 GB of weights" in report.plan
    assert "hf_secret" not in str(report)


def test_offline_nothing_can_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "hub_is_off", lambda: True)
    report = look("flux-schnell")
    assert report.exit_code == 1
    assert len(report.problems) == len(PARTS)
    assert "HF_HUB_OFFLINE" in str(report)


def test_earlier_downloads_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"lora": "dit_lora.safetensors", "projector": "projector.safetensors", "ae": "ae.safetensors"}
    monkeypatch.setattr(doctor, "cached", lambda part: folder / files.get(part.name, part.name))
    report = look("flux-dev", flux_dev=folder / "flux1-dev.safetensors")
    assert report.exit_code == 0
    assert [row.origin for row in report.rows] == ["file"] + ["hub cache"] * 6


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("memory", r"35\.5 GB of memory and this machine has 8\.0 GB"),
        ("disk", r"37\.9 GB have to be.*1\.0 GB free"),
    ],
)
def test_too_small_a_machine_would_not_run(what: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8e9, available=7e9))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    report = look("flux-schnell")
    assert report.exit_code == 1
    assert re.search(says, str(report))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_would_not_run(folder: Path) -> None:
    report = look(folder, device="cuda:7")
    assert report.exit_code == 1
    assert "USO_DEVICE" in str(report)


def test_unknown_model() -> None:
    report = look("flux-pro")
    assert report.exit_code == 1
    assert "flux-krea-dev" in str(report)


def test_folder_of_another_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    report = look(tmp_path)
    assert report.exit_code == 1
    assert "FluxPipeline" in str(report)


@pytest.mark.skipif(not sources.NANO_DIR.is_dir(), reason="assets/nano is not exported yet")
def test_nano_would_run_and_says_what_a_broken_one_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = look("nano")
    assert report.exit_code == 0
    assert "nano in float32" in report.plan
    copy = shutil.copytree(sources.NANO_DIR, tmp_path / "nano")
    shutil.rmtree(copy / "tokenizer")
    shutil.rmtree(copy / "vae")
    monkeypatch.setattr(sources, "NANO_DIR", copy)
    report = look("nano")
    assert report.exit_code == 1
    assert [row.name for row in report.rows if row.problem] == ["vae", "tokenizer"]
