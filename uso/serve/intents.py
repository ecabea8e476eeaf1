"""The uses of the page: what each sets, what is said about it, and an example of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from uso.schema import GenerationRequest

PICTURES = ("content_image", "style_image", "extra_style_image")
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"


@dataclass(frozen=True)
class Intent:
    """A use: the fields it sets (None empties a slot), what is said about it, which fields it needs (of each
    group one), and an example's fields."""

    name: str
    told: str
    sets: dict[str, Any]
    needs: tuple[tuple[str, ...], ...]
    example: dict[str, Any]

    def lacks(self, form: Mapping[str, Any]) -> str:
        """What is still to be given, as a sentence; empty when all is there."""
        missing = [
            "a " + " or a ".join(str(GenerationRequest.model_fields[name].title).lower() for name in group)
            for group in self.needs
            if not any(form[name] for name in group)
        ]
        return f"{self.name} needs {' and '.join(', '.join(missing).rsplit(', ', 1))}." if missing else ""


INTENTS = (
    Intent(
        "Restyle",
        "Empty prompt, the subject's shape, full subject detail. Drop a subject and a style.",
        {"prompt": "", "keep_size": True, "content_long_size": 1024},
        (("content_image",), ("style_image",)),
        {"content_image": "fox.jpg", "style_image": "pop-art.jpg"},
    ),
    Intent(
        "New scene",
        "Any shape, less subject detail. Drop a subject and say in the prompt where it is.",
        {"keep_size": False, "content_long_size": 512},
        (("content_image",), ("prompt",)),
        {
            "content_image": "sailboat.jpg",
            "style_image": "gradient-map.jpg",
            "prompt": "a sailboat",
        },
    ),
    Intent(
        "Style only",
        "No subject. Drop a style and say in the prompt what to draw in it.",
        {"content_image": None, "keep_size": False},
        (("style_image",), ("prompt",)),
        {"style_image": "pop-art.jpg", "prompt": "a mushroom"},
    ),
    Intent(
        "Mix styles",
        "Both styles count alike. Drop two styles, and a subject or a prompt.",
        {"keep_size": False},
        (("style_image",), ("extra_style_image",), ("content_image", "prompt")),
        {"content_image": "fox.jpg", "style_image": "delft-tile.jpg", "extra_style_image": "halftone.jpg"},
    ),
    Intent(
        "Text",
        "No pictures: the prompt alone.",
        {"content_image": None, "style_image": None, "extra_style_image": None, "keep_size": False},
        (("prompt",),),
        {"prompt": "a cactus"},
    ),
)


def thumbnail(intent: Intent) -> Image.Image:
    """The example's pictures side by side; its prompt where it has none."""
    names = [intent.example[name] for name in PICTURES if name in intent.example]
    sheet = Image.new("RGB", (160 * max(len(names), 1), 160), "#e7e5e4")
    for column, name in enumerate(names):
        with Image.open(EXAMPLES / name) as picture:
            sheet.paste(picture.resize((160, 160)), (160 * column, 0))
    if not names:
        ImageDraw.Draw(sheet).text((16, 40), intent.example["prompt"], fill="#44403c", font_size=24)
    return sheet
