"""What the README says works: its command blocks are run, its names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
# Exit codes that are right where no weights were downloaded.
EXPECTED = {"python -m uso doctor --model flux-dev": 1}


@pytest.fixture
def visitor(tmp_path: Path) -> Path:
    """A folder that has what a clone has, to write into."""
    for name in (
        "assets",
        "app.py",
        "uso",
        "Makefile",
        "requirements.txt",
        "requirements-dev.txt",
        "training",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str] | str, folder: Path) -> subprocess.CompletedProcess[str]:
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
    }
    for name in ("FLUX_DEV", "AE", "T5", "CLIP", "LORA", "PROJECTION_MODEL", "SIGLIP_PATH", "HF_TOKEN"):
        environment.pop(name, None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, shell=isinstance(command, str)
    )


def test_the_ratios_are_those_of_the_tables() -> None:
    said = re.search(
        r"takes (\S+) of the official code's time, (\S+) with\s.*? 512x512 (\S+),", README, re.DOTALL
    )
    assert said
    tables = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert [ratio for ratio in said.groups() if f"**{ratio}**" not in tables] == []


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize(
    ("language", "block"), BLOCKS, ids=[block.partition("\n")[0][:40] for _, block in BLOCKS]
)
def test_readme_block(visitor: Path, language: str, block: str) -> None:
    if language == "python":
        (visitor / "example.py").write_text(block)
        done = run([sys.executable, "example.py"], visitor)
        assert done.returncode == 0, done.stderr
        return
    for command in block.replace("\\\n", "").strip().splitlines():
        if command.startswith("make "):
            # it sets up everything, and runs this very test: what can be tried here is that its steps exist
            command = command.replace("make ", "make --dry-run --always-make ")
        done = run(command, visitor)
        assert done.returncode == EXPECTED.get(command, 0), done.stdout + done.stderr


def test_links_and_named_files_exist() -> None:
    for text, folder in ((README, ROOT), ((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), ROOT)):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        names = re.findall(r"`((?:uso|tests|training|docs|assets)/[\w./-]*)`", text)
        for name in links + names:
            assert (folder / name).exists(), name


def test_the_page_of_a_space_is_described() -> None:
    header = README.split("---")[1]
    fields = dict(line.split(":", 1) for line in header.strip().splitlines() if not line.startswith(" "))
    assert fields["sdk"].strip() == "gradio"
    assert (ROOT / fields["app_file"].strip()).is_file()
    assert len(fields["short_description"].strip()) <= 60


def test_requirements_allow_the_torch_of_a_space() -> None:
    assert "torch>=2.8,<2.14" in (ROOT / "requirements.txt").read_text().splitlines()
