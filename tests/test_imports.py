"""Imports point one way, and what need not be imported is not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer may import from itself and from those before it.
LAYERS = (
    {"uso.errors"},
    {"uso", "uso.schema"},
    {"uso.images", "uso.metadata", "uso.settings"},
    {"uso.model"},
    {"uso.doctor"},
    {
        "uso.serve",
        "uso.serve.work",
        "uso.serve.cost",
        "uso.serve.staging",
        "uso.serve.device",
        "uso.serve.store",
        "uso.serve.fetch",
    },
    {"uso.serve.files", "uso.serve.keys", "uso.serve.webhooks"},
    {"uso.serve.engine"},
    {"uso.serve.intents", "uso.serve.words", "uso.serve.ui", "uso.serve.api", "uso.batch"},
    {"uso.serve.server"},
    {"uso.cli"},
    {"uso.__main__", "app"},
)
WEB = {"gradio", "gradio_client", "fastapi", "starlette", "uvicorn"}
TORCH = {"torch", "diffusers", "transformers", "accelerate", "peft", "safetensors"}
# `uso/__init__` names the public classes lazily.
LAZY = "uso"


def modules() -> dict[str, Path]:
    files = [ROOT / "app.py", *(ROOT / "uso").rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports(file: Path) -> set[str]:
    """Everything imported anywhere in a file, types aside."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found.add(str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def layer(module: str) -> int:
    best = max(
        ((len(name), i) for i, names in enumerate(LAYERS) for name in names if within(module, name)),
        default=None,
    )
    assert best, f"{module} is in no layer"
    return best[1]


def within(module: str, package: str) -> bool:
    return module == package or (package not in ("uso", "uso.serve") and module.startswith(f"{package}."))


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_one_way(module: str) -> None:
    if module == LAZY:
        return
    for name in imports(modules()[module]):
        if name == "uso" or name.startswith("uso."):
            assert layer(name) <= layer(module), f"{module} imports {name}"


def test_page_and_api_know_nothing_of_each_other() -> None:
    assert "uso.serve.api" not in imports(modules()["uso.serve.ui"])
    assert "uso.serve.ui" not in imports(modules()["uso.serve.api"])


@pytest.mark.parametrize("module", sorted(modules()))
def test_the_model_knows_no_web_and_the_page_no_torch(module: str) -> None:
    top = {name.partition(".")[0] for name in imports(modules()[module])}
    if layer(module) < layer("uso.serve.ui"):
        assert not top & WEB
    if not module.startswith("uso.model") and module not in (
        "uso.serve.device",
        "uso.serve.staging",
        "uso.doctor",
        "uso.cli",
    ):
        assert not top & TORCH


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("uso", TORCH | WEB),
        ("uso.schema", TORCH | WEB),
        ("uso.images", TORCH | WEB),
        ("uso.cli", TORCH | WEB),
    ],
)
def test_light_modules_stay_light(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert not absent & {name.partition(".")[0] for name in loaded}
