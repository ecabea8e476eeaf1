"""The uses of the page: what each sets, what is said about it, and an example of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PICTURES = ("content_image", "style_image", "extra_style_image")
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"


@dataclass(frozen=True)
class Intent:
    """A use: the fields it sets (None empties a slot), what is said about it, and an example's fields."""

    name: str
    told: str
    sets: dict[str, Any]
    example: dict[str, Any]


INTENTS = (
    Intent(
        "Restyle",
        "Empty prompt, the subject's shape, full subject detail. Drop a subject and a style.",
        {"prompt": "", "keep_size": True, "content_long_size": 1024},
        {"content_image": "fox.jpg", "style_image": "pop-art.jpg"},
    ),
    Intent(
        "New scene",
        "Any shape, less subject detail. Drop a subject and say in the prompt where it is.",
        {"keep_size": False, "content_long_size": 512},
        {
            "content_image": "sailboat.jpg",
            "style_image": "gradient-map.jpg",
            "prompt": "a sailboat in front of mountains",
        },
    ),
    Intent(
        "Style only",
        "No subject. Drop a style and say in the prompt what to draw in it.",
        {"content_image": None, "keep_size": False},
        {"style_image": "pop-art.jpg", "prompt": "an owl"},
    ),
    Intent(
        "Mix styles",
        "Both styles count alike. Drop two styles, and a subject or a prompt.",
        {"keep_size": False},
        {"content_image": "fox.jpg", "style_image": "delft-tile.jpg", "extra_style_image": "halftone.jpg"},
    ),
    Intent(
        "Text",
        "No pictures: the prompt alone.",
        {"content_image": None, "style_image": None, "extra_style_image": None, "keep_size": False},
        {"prompt": "a red sailboat on a calm sea, watercolour"},
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
        ImageDraw.Draw(sheet).text((16, 40), "a red\nsailboat ...", fill="#44403c", font_size=24)
    return sheet
