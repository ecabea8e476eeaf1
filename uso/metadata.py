"""How a picture was made, kept in its PNG: `parameters` for people and other tools, `uso` (JSON) for us."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from uso import __version__
from uso.errors import InputError
from uso.images import MAX_BYTES
from uso.schema import GenerationRequest

JSON_MAX_CHARS = 2**17  # a prompt of the longest length, fully escaped, takes 48 KiB
_IMAGE_FIELDS = ("content_image", "style_image", "extra_style_image")
_LABELS = {"num_steps": "Steps", "guidance": "Distilled CFG Scale", "seed": "Seed", "model": "Model"}


def describe(
    request: GenerationRequest,
    *,
    width: int,
    height: int,
    seed: int,
    model: str,
    image_sha256: Mapping[str, str],
    lossy: Mapping[str, Any],
) -> dict[str, Any]:
    """The parameters of a picture as it was made, for `save_png`.

    Every field of the request with the size and seed really used, the model's name and version, and for each
    picture its hash (`image_sha256`: field -> hex) instead of its place, which may hold secrets. `lossy`: the
    settings that made it differ from what the model draws (`Settings.lossy`).
    """
    fields = request.model_dump(exclude=set(_IMAGE_FIELDS))
    used = {"width": width, "height": height, "seed": seed}
    return {
        **fields,
        **used,
        "image_sha256": dict(image_sha256),
        "model": model,
        **lossy,
        "software": f"uso {__version__}",
    }


def save_png(
    image: Image.Image, path_or_buffer: str | Path | BinaryIO, parameters: Mapping[str, Any]
) -> None:
    """Write the picture as PNG with its `parameters` (JSON values, see `describe`).

    A path appears complete or not at all: who resumes a batch takes what exists as done.
    """
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", _readable(parameters))
    text.add_text("uso", json.dumps(dict(parameters), ensure_ascii=True, allow_nan=False))
    if not isinstance(path_or_buffer, str | Path):
        image.save(path_or_buffer, format="PNG", pnginfo=text)
        return
    path = Path(path_or_buffer)
    unfinished = path.with_name(path.name + ".part")
    image.save(unfinished, format="PNG", pnginfo=text)
    os.replace(unfinished, path)


def _readable(parameters: Mapping[str, Any]) -> str:
    """The widespread form: the prompt, then `Steps: 25, Seed: 1, Size: 1024x1024, ...` on one line."""
    rest = {key: value for key, value in parameters.items() if key not in ("prompt", "width", "height")}
    pairs = {_LABELS.get(key, key): value for key, value in rest.items()}
    if "width" in parameters and "height" in parameters:
        pairs["Size"] = f"{parameters['width']}x{parameters['height']}"
    line = ", ".join(f"{label}: {_quoted(value)}" for label, value in pairs.items())
    return f"{parameters.get('prompt', '')}\n{line}"


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if any(mark in text for mark in ',:"\n') else text


def read_parameters(source: str | Path | BinaryIO) -> dict[str, Any]:
    """The parameters of a PNG that `save_png` wrote; InputError for any other file. Pixels are not decoded.

    Anybody can write such a PNG: check what comes back with `parse_request` before using it.
    """
    try:
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        else:
            data = source.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"The file cannot be read: {error}.") from error
    if len(data) > MAX_BYTES:
        raise InputError(
            f"The file is above the limit of {MAX_BYTES // 2**20} MiB: it is not a picture made here."
        )
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            text = picture.info.get("uso")
    except Exception as error:  # decoders raise nearly anything on damaged or hostile files
        raise InputError("The file is not a PNG picture: only PNGs made here hold their settings.") from error
    if not isinstance(text, str):
        raise InputError("The PNG holds no settings: it was not made here, or another program dropped them.")
    try:
        parameters = json.loads(text) if len(text) <= JSON_MAX_CHARS else None
    except (ValueError, RecursionError) as error:
        raise InputError("The PNG's settings are damaged: its `uso` text is not JSON.") from error
    if not isinstance(parameters, dict):
        raise InputError(f"The PNG's settings are not a JSON object of at most {JSON_MAX_CHARS} characters.")
    return parameters
