"""Our arithmetic against the official code's recorded tensors, and what differs on purpose, stated.

USO_GOLDENS names another set of recordings (default: the copy in tests/goldens). The distances are measured
by tests/parity.py in a process of its own, with reproducible arithmetic.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.parity import (
    GOLDENS,
    LIMITS,
    case_names,
    content_differs_on_purpose,
    failed,
    is_transparent,
    picture,
    read_case,
)
from uso.errors import ImageError, InputError
from uso.images import open_image, prepare_content, to_rgb
from uso.model.geometry import schedule_mu
from uso.model.scheduler import USOFlowMatchEulerScheduler
from uso.schema import resolve_size

RULES = json.loads((GOLDENS / "rules.json").read_text())


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.parity", "--json"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", case_names())
def test_case(measured: dict[str, Any], name: str) -> None:
    found = measured["cases"][name]
    case = read_case(name)
    expected = set(LIMITS) - {"token ids"}
    if not case["styles"]:
        expected -= {"pixel values", "siglip hidden", "style tokens"}
    if not case["content"]:
        expected -= {"content latents"}
    if all(content_differs_on_purpose(case, image) for image in case["content"]):
        expected -= {"content pixels"}
    assert set(found) == expected
    assert not failed(found)


def test_token_ids(measured: dict[str, Any]) -> None:
    assert not failed(measured["tokens"])


@pytest.mark.parametrize(
    ("part", "checks"),
    [
        ("projector high", {"style tokens", "first prediction", "final latents"}),
        ("projector mid", {"style tokens", "first prediction", "final latents"}),
        ("projector low", {"style tokens", "first prediction", "final latents"}),
        ("LoRA attn.to_out.0", {"first prediction", "final latents"}),
        ("LoRA attn.to_add_out", {"first prediction", "final latents"}),
        ("LoRA attn.add_v_proj", {"first prediction", "final latents"}),
        ("LoRA proj_out", {"first prediction", "final latents"}),
        ("offset", {"position ids", "first prediction", "final latents"}),
        ("schedule's L", {"timesteps", "final latents"}),
    ],
)
def test_a_broken_part_is_noticed(measured: dict[str, Any], part: str, checks: set[str]) -> None:
    assert not failed(measured["broken"]["nothing"])
    assert checks <= set(failed(measured["broken"][part]))


def _sha256(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize("rule", RULES["preprocess"], ids=lambda rule: f"{rule['image']}-{rule['long_size']}")
def test_preprocessing(rule: dict[str, Any]) -> None:
    image = picture(rule["image"])
    prepared = prepare_content(to_rgb(image), rule["long_size"])
    if image.size == (16, 16):
        # On purpose: the official code passes 16x16 pictures unresized; here they are pictures like others.
        assert rule["size"] == [16, 16]
        assert prepared.size == (rule["long_size"] // 16 * 16,) * 2
        return
    assert list(prepared.size) == rule["size"]
    # On purpose: alpha goes over white, where the official code shows the hidden colours.
    assert (_sha256(prepared) == rule["sha256_rgb_first"]) is not is_transparent(image)


@pytest.mark.parametrize("name", sorted({rule["image"] for rule in RULES["preprocess"]}))
def test_files_open_as_the_pictures_they_hold(name: str) -> None:
    path = GOLDENS / "images" / f"{name}.png"
    assert _sha256(open_image(path)) == _sha256(to_rgb(picture(name)))


@pytest.mark.parametrize(
    "rule", RULES["keep_size"], ids=lambda rule: f"{rule['image']}-{rule['content_long_size']}"
)
def test_keep_size(rule: dict[str, Any]) -> None:
    image = picture(rule["image"])
    long_size = rule["content_long_size"]

    def ours() -> tuple[int, int]:
        return resolve_size(width=None, height=None, keep_size=True, content_size=image.size)[:2]

    if image.size == (16, 16):
        assert ours() == (1024, 1024)  # on purpose: no special case
        return
    # The official size is that of the preprocessed picture, scaled to a long side of 1024 ...
    prepared = prepare_content(to_rgb(image), long_size)
    official = [int(side * (1024 / long_size)) for side in prepared.size]
    assert official == [rule["width"], rule["height"]]
    assert [side // 16 * 16 for side in official] == [rule["out_width"], rule["out_height"]]
    # ... on purpose ours is that of the picture itself: nothing rounded at the small size, short side >= 512.
    width, height = ours()
    assert width % 16 == height % 16 == 0
    assert 512 <= min(width, height) <= max(width, height) <= 1536
    assert max(width, height) == 1024 or min(width, height) == 512
    crop = 16 * 1024 / long_size  # what the official rounding may take off a side
    if min(width, height) > 512:
        assert abs(width - rule["out_width"]) <= crop + 16
        assert abs(height - rule["out_height"]) <= crop + 16


def test_keep_size_has_a_limit_where_the_official_code_has_none() -> None:
    with pytest.raises(InputError, match="3:1"):
        resolve_size(width=None, height=None, keep_size=True, content_size=(310, 100))


def test_own_size_and_crops_below_a_token_have_an_answer() -> None:
    image = Image.new("RGB", (2000, 400))
    assert prepare_content(image, 0).size == (1024, 192)  # official: division by zero
    with pytest.raises(ImageError, match="content_long_size"):
        prepare_content(image, 64)  # official: a crash inside the VAE


@pytest.mark.parametrize("rule", RULES["schedule"], ids=lambda rule: f"{rule['width']}x{rule['height']}")
def test_schedule(rule: dict[str, Any]) -> None:
    scheduler = USOFlowMatchEulerScheduler()
    scheduler.set_timesteps(rule["steps"], mu=schedule_mu(width=rule["width"], height=rule["height"]))
    recorded = torch.tensor(rule["timesteps"], dtype=torch.float64)
    assert scheduler.sigmas.shape == recorded.shape
    assert (scheduler.sigmas.double() - recorded).abs().max() <= 1e-6
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)


@pytest.mark.parametrize("rule", RULES["noise"], ids=lambda rule: f"seed {rule['seed']}")
def test_noise(rule: dict[str, Any]) -> None:
    from tests.parity import load
    from uso.model.geometry import unpack_latents

    pipe = load(read_case(case_names()[0])["variant"])
    size = {"width": rule["width"], "height": rule["height"]}
    packed = pipe.prepare_latents(
        **size,
        device=torch.device("cpu"),
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(rule["seed"]),
        latents=None,
    )
    noise = unpack_latents(packed, **size)
    assert list(noise.shape) == rule["shape"]
    assert noise.flatten()[:16].tolist() == rule["first16"]
    assert noise.flatten()[-4:].tolist() == rule["last4"]
    assert noise.double().abs().sum().item() == pytest.approx(rule["sum_abs"])
    assert hashlib.sha256(noise.contiguous().numpy().tobytes()).hexdigest() == rule["sha256_f32le"]
