"""What a PNG says about how it was made."""

import io
import json
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

import uso
from uso.errors import InputError
from uso.images import MAX_BYTES, open_image
from uso.metadata import JSON_MAX_CHARS, describe, read_parameters, save_png
from uso.schema import GenerationRequest, parse_request

REQUEST = parse_request(
    {
        "prompt": "a fox,\nsaid “Schnee” 雪\u2028",
        "content_image": "https://example.org/fox.png?token=secret",
        "guidance": 3.5,
        "keep_size": True,
    }
)
HASHES = {"content_image": "ab" * 32}
PARAMETERS = describe(
    REQUEST,
    width=1024,
    height=768,
    seed=3407,
    model="flux-dev, uso 1.0",
    image_sha256=HASHES,
    lossy={"quantize": "int8", "turbo": True},
)


def png_with(**texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_description_is_complete_and_keeps_no_places():
    images = {"content_image", "style_image", "extra_style_image"}
    assert set(GenerationRequest.model_fields) - images <= set(PARAMETERS)
    assert "secret" not in json.dumps(PARAMETERS)
    assert (PARAMETERS["seed"], PARAMETERS["width"], PARAMETERS["height"]) == (3407, 1024, 768)
    assert PARAMETERS["image_sha256"] == HASHES
    assert PARAMETERS["software"] == f"uso {uso.__version__}"
    assert (PARAMETERS["quantize"], PARAMETERS["turbo"]) == ("int8", True)


def test_round_trip(tmp_path):
    path = tmp_path / "out.png"
    save_png(Image.new("RGB", (32, 16), "red"), path, PARAMETERS)
    buffer = io.BytesIO()
    save_png(Image.new("RGB", (32, 16), "red"), buffer, PARAMETERS)
    assert path.read_bytes() == buffer.getvalue()
    buffer.seek(0)
    assert read_parameters(path) == read_parameters(str(path)) == read_parameters(buffer) == PARAMETERS
    again = parse_request(
        {name: PARAMETERS[name] for name in GenerationRequest.model_fields if name in PARAMETERS}
    )
    assert (again.prompt, again.seed, again.guidance, again.keep_size) == (REQUEST.prompt, 3407, 3.5, True)
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_text_for_people_and_other_tools():
    buffer = io.BytesIO()
    save_png(Image.new("RGB", (16, 16)), buffer, PARAMETERS)
    image = Image.open(buffer)
    prompt, line = image.info["parameters"].rsplit("\n", 1)
    assert prompt == REQUEST.prompt
    for part in (
        "Steps: 25",
        "Distilled CFG Scale: 3.5",
        "Seed: 3407",
        "Size: 1024x768",
        'Model: "flux-dev, uso 1.0"',
        "keep_size: true",
    ):
        assert part in line
    assert image.info["uso"].isascii()


def test_longest_prompt_fits(tmp_path):
    request = parse_request({"prompt": "😀" * 4096})
    parameters = describe(request, width=512, height=512, seed=0, model="nano", image_sha256={}, lossy={})
    save_png(Image.new("RGB", (16, 16)), tmp_path / "a.png", parameters)
    assert read_parameters(tmp_path / "a.png")["prompt"] == request.prompt


def test_an_interrupted_write_leaves_no_picture(tmp_path):
    path = tmp_path / "out.png"
    with pytest.raises(ValueError, match="JSON"):
        save_png(Image.new("RGB", (16, 16)), path, {"guidance": float("nan")})
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("CMYK", (16, 16)), path, PARAMETERS)
    assert not path.exists()


def test_nothing_of_the_input_pictures_goes_out(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    source = io.BytesIO()
    Image.new("RGB", (32, 32)).save(source, "JPEG", exif=exif, dpi=(300, 300), comment=b"private")
    save_png(open_image(source.getvalue()), tmp_path / "out.png", PARAMETERS)
    with Image.open(tmp_path / "out.png") as image:
        assert set(image.info) == {"parameters", "uso"}
        assert not image.getexif()


BOMB = b"uso\0\0" + zlib.compress(bytes(50_000_000), 9)
BOMB_CHUNK = struct.pack(">I", len(BOMB)) + b"zTXt" + BOMB + struct.pack(">I", zlib.crc32(b"zTXt" + BOMB))
PLAIN = png_with()
NOT_OURS = {
    "no text": (PLAIN, "holds no settings"),
    "another tool": (png_with(parameters="a cat\nSteps: 20"), "holds no settings"),
    "not JSON": (png_with(uso="{"), "damaged"),
    "deep": (png_with(uso="[" * 100_000), "damaged"),
    "not an object": (png_with(uso="[1]"), "not a JSON object"),
    "too long": (png_with(uso=json.dumps({"prompt": "a" * JSON_MAX_CHARS})), "not a JSON object of at most"),
    "text bomb": (PLAIN[:33] + BOMB_CHUNK + PLAIN[33:], "not a PNG"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "not a PNG"),
    "empty": (b"", "not a PNG"),
    "too big": (PLAIN + bytes(MAX_BYTES), "above the limit"),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_files_that_are_not_ours(name, tmp_path):
    data, words = NOT_OURS[name]
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", io.BytesIO(data)):
        with pytest.raises(InputError, match=words):
            read_parameters(source)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_parameters(tmp_path / "none.png")
