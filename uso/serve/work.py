"""What passes between the engine, which keeps the jobs, and the device, which draws. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from uso.schema import GenerationRequest

Phase = Literal["encoding", "drawing", "decoding"]
Sizes = Mapping[str, tuple[int, int]]  # (width, height) of a request's pictures, by field


@dataclass(frozen=True)
class Work:
    """One picture to draw, with everything decided: pictures opened, size and seed settled."""

    prompt: str
    width: int
    height: int
    num_steps: int
    guidance: float
    seed: int
    content_long_size: int
    content_image: Image.Image | None = None
    style_images: tuple[Image.Image, ...] = ()

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        pictures: Mapping[str, Image.Image],
        *,
        width: int,
        height: int,
        seed: int,
    ) -> "Work":
        """What `request` asks for; `pictures` by request field."""
        styles = ("style_image", "extra_style_image")
        return cls(
            prompt=request.prompt,
            width=width,
            height=height,
            num_steps=request.num_steps,
            guidance=request.guidance,
            seed=seed,
            content_long_size=request.content_long_size,
            content_image=pictures.get("content_image"),
            style_images=tuple(pictures[name] for name in styles if name in pictures),
        )


@dataclass(frozen=True)
class Progress:
    """Where the drawing stands; `preview` is a small picture of it as a data URI, at most two a second."""

    phase: Phase
    step: int
    preview: str | None = None


@dataclass(frozen=True)
class Drawn:
    """The picture, after how many steps, seconds by phase, the memory mode, bytes at the peak if known, and
    notes for the user."""

    image: Image.Image
    steps: int
    seconds: dict[Phase, float]
    memory: str
    peak: int | None = None
    notes: list[str] = field(default_factory=list)


Event = Progress | Drawn
