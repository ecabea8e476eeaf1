"""Shared fixtures: the tiny pipeline of the goldens, real classes with random weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CPUINFO = Path("/proc/cpuinfo")
if CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text():
    # There MKL's sums depend on where in memory the numbers lie, and some tests compare to the bit.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens' FLUX.1-dev with USO's LoRA merged, as a diffusers folder."""
    from tests.parity import load

    folder = tmp_path_factory.mktemp("tiny")
    load("flux-dev").save_pretrained(folder)
    return folder


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No settings from this machine: an empty working folder and none of our variables."""
    from uso.settings import Settings, environment_name, get_settings

    for field in Settings.model_fields:
        monkeypatch.delenv(environment_name(field), raising=False)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()
