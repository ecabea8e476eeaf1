"""Pictures in: any file a visitor may have becomes a plain 8-bit sRGB picture, or an error that says why not.

Pillow only. Files are strangers' bytes: the format is taken from the content and an allow-list, and sizes are
checked before anything is decoded.
"""

import io
import os
from pathlib import Path
from typing import BinaryIO

import pillow_heif
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from uso.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "HEIF")
MAX_BYTES = 50 * 2**20
MAX_PIXELS = 64_000_000  # below Pillow's own bomb warning (89 million)
MAX_RATIO = 8
OWN_SIZE_MAX = 1024  # longest side when content_long_size is 0
TOKEN_SIDE = 16  # pixels a side that become one token of the model, so the least a picture can have

pillow_heif.register_heif_opener(thumbnails=False)

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: bytes | str | Path | BinaryIO, *, field: str = "image") -> Image.Image:
    """Open a PNG, JPEG, WEBP or HEIC picture (its first frame) as upright 8-bit sRGB without metadata.

    `source` is the file's bytes, its path or an open binary file; `field` is the request field errors name.
    Raises ImageError when it cannot be read, is of another kind, damaged, above 50 MiB or 64 million pixels,
    has a side below 16 pixels or is thinner than 8:1.
    """
    data = _read(source, field)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(picture.size, field)
            picture.load()
            return to_rgb(picture)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"`{field}` is not a PNG, JPEG, WEBP or HEIC picture, whatever its name says: convert it first.",
            field=field,
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_too_many_pixels(field), field=field) from error
    except Exception as error:  # decoders raise nearly anything on damaged or hostile files
        reason = " ".join(str(error).split())
        raise ImageError(
            f"`{field}` is damaged or cut short ({reason}): open it in an editor and save it again.",
            field=field,
        ) from error


def _read(source: bytes | str | Path | BinaryIO, field: str) -> bytes:
    """All bytes of the source, never more than one above the cap in memory."""
    if isinstance(source, str | Path) and not os.path.isfile(source):
        raise ImageError(f"`{field}`: there is no file {str(source)!r}.", field=field)
    try:
        if isinstance(source, bytes):
            data = source
        elif isinstance(source, str | Path):
            with open(source, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        else:
            data = source.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"`{field}` cannot be read ({error}).", field=field) from error
    if not data:
        raise ImageError(f"`{field}` is an empty file: choose a picture.", field=field)
    if len(data) > MAX_BYTES:
        raise ImageError(
            f"`{field}` is above the limit of {MAX_BYTES // 2**20} MiB: make it smaller or save it as JPEG.",
            field=field,
        )
    return data


def _check_size(size: tuple[int, int], field: str) -> None:
    """The header's (width, height) against the caps, before anything is decoded."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(_too_many_pixels(field, f" ({width}x{height})"), field=field)
    if min(size) < TOKEN_SIDE:
        raise ImageError(
            f"`{field}` is {width}x{height}, but each side must have at least {TOKEN_SIDE} pixels: "
            "use a larger picture.",
            field=field,
        )
    if max(size) > MAX_RATIO * min(size):
        raise ImageError(
            f"`{field}` is {width}x{height}, thinner than {MAX_RATIO}:1: crop it to a less thin shape.",
            field=field,
        )


def _too_many_pixels(field: str, size: str = "") -> str:
    return (
        f"`{field}` has more than {MAX_PIXELS // 1_000_000} million pixels{size}: make it smaller; "
        f"the model looks at {OWN_SIZE_MAX} pixels a side at most."
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """A fresh, upright 8-bit sRGB copy of a picture of any mode, without metadata.

    EXIF orientation is applied, 16-bit gray scaled, transparency put over white, colours go through
    the embedded profile.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in browsers, damaged EXIF does not spoil the picture
        orientation = None
    profile = image.info.get("icc_profile")
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    if image.mode.startswith("I"):  # 16-bit gray
        transparent = image.info.get("transparency")
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        if transparent is not None:
            image.info["transparency"] = round(transparent / 257)
    if image.has_transparency_data:
        with_alpha = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        image = Image.new(with_alpha.mode[:-1], with_alpha.size, "white")
        image.paste(with_alpha, mask=with_alpha.getchannel("A"))
    if profile:
        image = _through_profile(image, profile)
    image = image.convert("RGB")
    image.info = {}
    return image


def _through_profile(image: Image.Image, icc: bytes) -> Image.Image:
    """The picture in sRGB. As in browsers, a broken profile, or one for another mode, is ignored."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        if space == "RGB" and image.mode != "CMYK":
            if "srgb" in (profile.profile.profile_description or "").lower():
                return image  # a conversion would only add rounding
            image = image.convert("RGB")
        elif (space, image.mode) not in (("GRAY", "L"), ("CMYK", "CMYK")):
            return image
        converted = ImageCms.profileToProfile(image, profile, _SRGB, outputMode="RGB")
        return converted or image
    except (OSError, ImageCms.PyCMSError):
        return image


def with_long_side(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """`size` (width, height) scaled; truncated by int(), in the official order of operations."""
    width, height = size
    if width >= height:
        return long_side, int((long_side / width) * height)
    return int((long_side / height) * width), long_side


def prepare_content(image: Image.Image, long_size: int) -> Image.Image:
    """The content picture as the VAE reads it: long side `long_size`, centre crop to multiples of 16.

    `image` is RGB (see `to_rgb`); `long_size` in pixels, 0 for the picture's own long side, at most 1024.
    Official `preprocess_ref` (uso/flux/pipeline.py) without its exception for 16x16 pictures. Raises
    ImageError when a side would be below 16.
    """
    if image.mode != "RGB":
        raise ImageError(
            f"`content_image` must be an RGB picture, got mode {image.mode}.", field="content_image"
        )
    width, height = image.size
    long_size = long_size or min(max(image.size), OWN_SIZE_MAX)
    new_width, new_height = with_long_side(image.size, long_size)
    if min(new_width, new_height) < TOKEN_SIDE:
        raise ImageError(
            f"`content_long_size` {long_size} shrinks the {width}x{height} content picture to {new_width}x"
            f"{new_height}, but each side must keep at least {TOKEN_SIDE} pixels: raise it, or crop the "
            "picture to a less thin shape.",
            field="content_long_size",
        )
    crop_width, crop_height = (side // TOKEN_SIDE * TOKEN_SIDE for side in (new_width, new_height))
    left, top = (new_width - crop_width) // 2, (new_height - crop_height) // 2
    resized = image.resize((new_width, new_height), resample=Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + crop_width, top + crop_height))
