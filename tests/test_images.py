"""Pictures in: each mode to its golden pixel, wrong and hostile files to errors, the official resize."""

import hashlib
import io
import json
import os
import resource
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from uso.errors import ImageError
from uso.images import MAX_BYTES, MAX_PIXELS, open_image, prepare_content, to_rgb

GOLDENS = Path(os.environ.get("USO_GOLDENS", Path(__file__).parent / "goldens"))
SIDE = 16


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode, colour):
    return Image.new(mode, (SIDE, SIDE), colour)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour_type, rows, *extra):
    """A PNG by hand: for what Pillow cannot write, and headers that promise more than the file holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def plain_png(depth, colour_type, pixel, *extra):
    return png(SIDE, SIDE, depth, colour_type, (b"\0" + pixel * SIDE) * SIDE, *extra)


def icc(space, pcs, **tags):
    """A minimal ICC version 2 profile; tags by signature."""
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", offset + len(body), 0x02400000, b"prtr", space, pcs, b"acsp")
    head += struct.pack(">28xiii", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


WHITE = xyz(0.9642, 1, 0.8249)
SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">HH5i", 3, 0, 157286, 62119, 3417, 5073, 2651)
DISPLAY_P3 = icc(
    b"RGB ",
    b"XYZ ",
    wtpt=WHITE,
    rXYZ=xyz(0.51512, 0.24120, -0.00105),
    gXYZ=xyz(0.29198, 0.69225, 0.04189),
    bXYZ=xyz(0.15710, 0.06657, 0.78407),
    **dict.fromkeys(("rTRC", "gTRC", "bTRC"), SRGB_CURVE),
)
LINEAR_GRAY = icc(b"GRAY", b"XYZ ", wtpt=WHITE, kTRC=gamma(1.0))
# Paper is white, black is black, and cyan is a middle gray (L* 50.2): nothing like plain CMYK.
IDENTITY_CURVE = bytes(range(256))
CYAN_IS_GRAY = icc(
    b"CMYK",
    b"Lab ",
    wtpt=WHITE,
    A2B0=b"mft1\0\0\0\0"
    + bytes((4, 3, 2, 0))
    + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    + IDENTITY_CURVE * 4
    + bytes((255, 128, 128, 0, 128, 128)) * 4  # Lab of no cyan; the last ink, black, alternates
    + bytes((128, 128, 128, 0, 128, 128)) * 4
    + IDENTITY_CURVE * 3,
)


def palette(**options):
    image = plain("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image, **options)


HALF = 0x8000
GOLDEN_PIXELS = {
    "1-bit": (encoded(plain("1", 1)), (255, 255, 255), 0),
    "gray": (encoded(plain("L", 77)), (77, 77, 77), 0),
    "gray, key colour": (encoded(plain("L", 77), transparency=77), (255, 255, 255), 0),
    "gray alpha": (encoded(plain("LA", (100, 51))), (224, 224, 224), 0),
    "gray 16": (plain_png(16, 0, struct.pack(">H", 40000)), (156, 156, 156), 0),
    "gray 16 white": (plain_png(16, 0, b"\xff\xff"), (255, 255, 255), 0),
    "gray 16, key colour": (
        plain_png(16, 0, struct.pack(">H", 40000), chunk(b"tRNS", struct.pack(">H", 40000))),
        (255, 255, 255),
        0,
    ),
    "gray alpha 16": (plain_png(16, 4, struct.pack(">HH", 40000, HALF)), (205, 205, 205), 1),
    "palette": (palette(), (200, 100, 50), 0),
    "palette, one transparent": (palette(transparency=1), (255, 255, 255), 0),
    "palette, half transparent": (palette(transparency=bytes((255, 128))), (227, 177, 152), 0),
    "rgb": (encoded(plain("RGB", (1, 2, 3))), (1, 2, 3), 0),
    "rgb, key colour": (encoded(plain("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255), 0),
    "rgb 16": (plain_png(16, 2, struct.pack(">HHH", 40000, 1000, 65535)), (156, 3, 255), 1),
    "rgba, hidden colour": (encoded(plain("RGBA", (200, 0, 0, 0))), (255, 255, 255), 0),
    "rgba": (encoded(plain("RGBA", (200, 0, 0, 51))), (244, 204, 204), 0),
    "rgba 16": (plain_png(16, 6, struct.pack(">HHHH", 40000, 0, 65535, HALF)), (205, 127, 255), 1),
    "jpeg": (encoded(plain("RGB", (200, 30, 30)), "JPEG", quality=100), (200, 30, 30), 2),
    "jpeg gray": (encoded(plain("L", 77), "JPEG"), (77, 77, 77), 1),
    "jpeg cmyk": (encoded(plain("CMYK", (200, 30, 0, 0)), "JPEG", quality=100), (55, 225, 255), 2),
    "webp": (encoded(plain("RGB", (200, 30, 30)), "WEBP", lossless=True), (200, 30, 30), 0),
    "webp alpha": (encoded(plain("RGBA", (200, 0, 0, 51)), "WEBP", lossless=True), (244, 204, 204), 0),
    "heic": (encoded(plain("RGB", (200, 30, 30)), "HEIF", quality=95), (200, 30, 30), 3),
    "heic alpha": (encoded(plain("RGBA", (200, 30, 30, 0)), "HEIF", quality=95), (255, 255, 255), 2),
    "heic 16": (encoded(plain("I;16", 40000), "HEIF", quality=95), (156, 156, 156), 2),
    # sRGB red is (234, 51, 35) in Display P3.
    "display p3": (encoded(plain("RGB", (234, 51, 35)), icc_profile=DISPLAY_P3), (255, 0, 0), 2),
    "display p3 alpha": (
        encoded(plain("RGBA", (234, 51, 35, 0)), icc_profile=DISPLAY_P3),
        (255, 255, 255),
        0,
    ),
    "display p3 on gray": (encoded(plain("L", 77), icc_profile=DISPLAY_P3), (77, 77, 77), 1),
    "linear gray": (encoded(plain("L", 128), icc_profile=LINEAR_GRAY), (188, 188, 188), 1),
    "cmyk profile": (
        encoded(plain("CMYK", (255, 0, 0, 0)), "JPEG", quality=100, icc_profile=CYAN_IS_GRAY),
        (120, 120, 120),
        2,
    ),
    "profile of another mode": (encoded(plain("RGB", (9, 9, 9)), icc_profile=CYAN_IS_GRAY), (9, 9, 9), 0),
    "broken profile": (encoded(plain("RGB", (9, 9, 9)), icc_profile=b"no profile"), (9, 9, 9), 0),
}


@pytest.mark.parametrize("name", GOLDEN_PIXELS)
def test_golden_pixel_of_each_mode(name):
    data, expected, tolerance = GOLDEN_PIXELS[name]
    image = open_image(data)
    assert (image.mode, image.size, image.info) == ("RGB", (SIDE, SIDE), {})
    for x, y in ((0, 0), (SIDE // 2, SIDE // 2), (SIDE - 1, SIDE - 1)):
        assert image.getpixel((x, y)) == pytest.approx(expected, abs=tolerance)


def test_pictures_of_memory_only_modes():
    for image, expected in [
        (plain("RGBA", (200, 0, 0, 51)).convert("RGBa"), (244, 204, 204)),
        (plain("LA", (100, 51)).convert("La"), (224, 224, 224)),
        (plain("PA", (0, 0)), (255, 255, 255)),
        (plain("I", 40000), (156, 156, 156)),
    ]:
        assert to_rgb(image).getpixel((0, 0)) == pytest.approx(expected, abs=2), image.mode


def test_srgb_profile_changes_nothing():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(encoded(image, icc_profile=profile)).tobytes() == image.tobytes()


# EXIF says which sides of the upright picture the stored first row and first column are: (row, column) of the
# stored picture -> (x, y) of the upright one, whose last column is X and last row Y.
ORIENTATIONS = {
    1: lambda row, column, X, Y: (column, row),  # top, left
    2: lambda row, column, X, Y: (X - column, row),  # top, right
    3: lambda row, column, X, Y: (X - column, Y - row),  # bottom, right
    4: lambda row, column, X, Y: (column, Y - row),  # bottom, left
    5: lambda row, column, X, Y: (row, column),  # left, top
    6: lambda row, column, X, Y: (X - row, column),  # right, top
    7: lambda row, column, X, Y: (X - row, Y - column),  # right, bottom
    8: lambda row, column, X, Y: (row, Y - column),  # left, bottom
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(orientation, kind):
    upright = Image.new("RGB", (20, 16), "gray")
    corners = {(0, 0): (255, 0, 0), (19, 0): (0, 255, 0), (0, 15): (0, 0, 255), (19, 15): (255, 255, 0)}
    for place, colour in corners.items():
        upright.putpixel(place, colour)
    stored = Image.new("RGB", (20, 16) if orientation < 5 else (16, 20))
    for row in range(stored.height):
        for column in range(stored.width):
            place = ORIENTATIONS[orientation](row, column, 19, 15)
            stored.putpixel((column, row), upright.getpixel(place))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "taken at home"
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_image(encoded(stored, kind, exif=exif, **options))
    assert image.size == upright.size
    assert image.tobytes() == upright.tobytes()
    assert not image.getexif()
    assert image.info == {}


@pytest.mark.parametrize("kind", ["JPEG", "HEIF"])
def test_photographs_are_turned_once(kind):
    stored = Image.new("RGB", (96, 64), "blue")
    stored.paste("red", (0, 0, 96, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored first row is the right side
    image = open_image(encoded(stored, kind, exif=exif.tobytes()))
    assert image.size == (64, 96)
    assert image.getpixel((60, 48)) == pytest.approx((255, 0, 0), abs=8)
    assert image.getpixel((4, 48)) == pytest.approx((0, 0, 255), abs=8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!", b"Exif\0\0II*\0\x08\0\0\0\0\0"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_exif_is_ignored(kind, exif):
    assert open_image(encoded(plain("RGB", 0), kind, exif=exif)).getpixel((0, 0)) == (0, 0, 0)


def test_first_frame_of_animations():
    frames = [plain("RGB", colour) for colour in ("red", "lime")]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {}), ("HEIF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=8), kind


def test_sources(tmp_path):
    data = encoded(plain("RGB", (1, 2, 3)))
    path = tmp_path / "picture.txt"  # the name does not matter
    path.write_bytes(data)
    for source in (data, path, str(path), io.BytesIO(data)):
        assert open_image(source).getpixel((0, 0)) == (1, 2, 3)


HTML = b"<!doctype html><html><body>404</body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
NOISE = Image.effect_noise((200, 200), 80).convert("RGB")
WRONG_FILES = {
    "TIFF": (encoded(NOISE, "TIFF"), "not a PNG, JPEG, WEBP or HEIC"),
    "PDF": (encoded(NOISE, "PDF"), "not a PNG, JPEG, WEBP or HEIC"),
    "EPS": (EPS, "not a PNG, JPEG, WEBP or HEIC"),
    "SVG": (SVG, "not a PNG, JPEG, WEBP or HEIC"),
    "HTML": (HTML, "not a PNG, JPEG, WEBP or HEIC"),
    "GIF": (encoded(NOISE, "GIF"), "not a PNG, JPEG, WEBP or HEIC"),
    "BMP": (encoded(NOISE, "BMP"), "not a PNG, JPEG, WEBP or HEIC"),
    "empty": (b"", "empty file"),
    "only a header": (encoded(NOISE)[:30], "damaged or cut short|not a PNG"),
    "truncated PNG": (encoded(NOISE)[:-5000], "damaged or cut short"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:-5000], "damaged or cut short"),
    "truncated WEBP": (encoded(NOISE, "WEBP")[:-5000], "damaged or cut short"),
    "truncated HEIC": (encoded(NOISE, "HEIF")[:-5000], "damaged or cut short"),
    "changed byte": (encoded(NOISE)[:500] + b"!" + encoded(NOISE)[501:], "damaged or cut short"),
    "1x1": (encoded(Image.new("RGB", (1, 1))), "is 1x1, but each side must have at least 16 pixels"),
    "20000x1": (encoded(Image.new("RGB", (20000, 1))), "is 20000x1, but each side must"),
    "too thin": (encoded(Image.new("RGB", (16, 129))), "is 16x129, thinner than 8:1"),
    "too many bytes": (encoded(NOISE) + bytes(MAX_BYTES), "above the limit of 50 MiB"),
    "zTXt bomb": (
        plain_png(8, 0, b"\7", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))),
        "damaged or cut short",
    ),
    "iTXt bomb": (
        plain_png(8, 0, b"\7", chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50_000_000), 9))),
        "damaged or cut short",
    ),
    "profile bomb": (
        plain_png(8, 0, b"\7", chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))),
        "damaged or cut short",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files(name, tmp_path):
    data, words = WRONG_FILES[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError, match=f"`style_image`.*({words})") as caught:
            open_image(source, field="style_image")
        assert caught.value.field == "style_image"
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(20000, 20000), (10000, 10000), (8001, 8000)])
def test_pixel_bombs_are_refused_by_their_header(width, height):
    """400 MP that are 48 KB of file; for the others Pillow alone only warns, or says nothing."""
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(data) < 60_000
    assert width * height > MAX_PIXELS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="`image` has more than 64 million pixels"):
        open_image(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_unreadable_sources(tmp_path):
    closed = io.BytesIO(b"")
    closed.close()
    for source, words in [
        (tmp_path / "none.png", "there is no file"),
        (str(tmp_path), "there is no file"),
        ("a\0b.png", "there is no file"),
        ("a" * 5000, "there is no file"),
        ("/dev/zero", "there is no file"),
        (closed, "cannot be read"),
    ]:
        with pytest.raises(ImageError, match=f"`content_image`.*{words}") as caught:
            open_image(source, field="content_image")
        assert caught.value.field == "content_image"


@settings(deadline=None, max_examples=60)
@given(
    st.binary(max_size=200),
    st.sampled_from([encoded(plain("RGB", 9), kind) for kind in ("PNG", "JPEG", "WEBP")]),
)
def test_any_bytes_open_or_give_the_named_error(noise, data):
    for source in (noise, data[: len(noise)] + noise, data[:40] + noise + data[40:]):
        try:
            outcome = open_image(source).mode
        except ImageError as error:
            outcome = error.field
        assert outcome in ("RGB", "image")


def golden_rules():
    return json.loads((GOLDENS / "rules.json").read_text())["preprocess"]


@pytest.mark.parametrize("entry", golden_rules(), ids=lambda entry: f"{entry['image']}-{entry['long_size']}")
def test_prepare_content_is_the_official_preprocessing(entry):
    """Sizes and every byte; except 16x16 pictures, which the official code passes through and we do not."""
    image = Image.open(GOLDENS / "images" / f"{entry['image']}.png").convert("RGB")
    prepared = prepare_content(image, entry["long_size"])
    if image.size == (16, 16):
        side = entry["long_size"] // 16 * 16
        assert prepared.size == (side, side)
        return
    assert list(prepared.size) == entry["size"]
    assert hashlib.sha256(prepared.tobytes()).hexdigest() == entry["sha256_rgb_first"]


def test_opening_keeps_rgb_and_gray_pictures_exact():
    for path in (GOLDENS / "images").glob("*.png"):
        with Image.open(path) as stored:
            if stored.mode in ("RGB", "L"):
                assert open_image(path).tobytes() == stored.convert("RGB").tobytes()


def test_own_size():
    assert prepare_content(Image.new("RGB", (200, 100)), 0).size == (192, 96)
    assert prepare_content(Image.new("RGB", (100, 2048 // 2)), 0).size == (96, 1024)
    assert prepare_content(Image.new("RGB", (2048, 512)), 0).size == (1024, 256)


@pytest.mark.parametrize(("size", "long_size"), [((128, 16), 127), ((64, 64), 15), ((16, 64), 63)])
def test_too_small_after_the_resize(size, long_size):
    with pytest.raises(ImageError, match=f"`content_long_size` {long_size} shrinks.*raise it") as caught:
        prepare_content(Image.new("RGB", size), long_size)
    assert caught.value.field == "content_long_size"


def test_prepare_content_takes_rgb_only():
    with pytest.raises(ImageError, match="must be an RGB picture, got mode RGBA"):
        prepare_content(Image.new("RGBA", (64, 64)), 64)


@settings(deadline=None, max_examples=80)
@given(st.integers(16, 400), st.integers(16, 400), st.integers(0, 300))
@example(16, 16, 0)
@example(400, 50, 128)
@example(17, 113, 300)
def test_prepared_sizes(width, height, long_size):
    image = Image.new("RGB", (width, height))
    short = int((long_size or max(image.size)) / max(image.size) * min(image.size))
    if short < 16:
        with pytest.raises(ImageError) as caught:
            prepare_content(image, long_size)
        assert caught.value.field == "content_long_size"
        return
    prepared = prepare_content(image, long_size)
    long = long_size or max(width, height)
    assert all(side % 16 == 0 and side >= 16 for side in prepared.size)
    assert max(prepared.size) == long // 16 * 16
    assert min(prepared.size) > min(width, height) * long / max(width, height) - 17
