"""USO: one subject, any style. Generate a picture from a subject picture, style pictures and a prompt.

`load_pipeline("nano")` gives a `USOPipeline`; `GenerationRequest` is what page, API and command line ask for.
The names are loaded when first used: importing `uso` imports neither torch nor gradio.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uso.model.checkpoints import load_pipeline
    from uso.model.pipeline import USOPipeline
    from uso.schema import GenerationRequest

__version__ = "0.1.0"
__all__ = ["GenerationRequest", "USOPipeline", "load_pipeline"]

_HOMES = {
    "GenerationRequest": "uso.schema",
    "USOPipeline": "uso.model.pipeline",
    "load_pipeline": "uso.model.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'uso' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
