"""What is compared: one architecture in three sizes, with random weights made from nothing but their names.

Imported beside the official code, whose package is also called `uso`: knows neither package.
"""

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens" / "weights"
PROMPT = "A cat sleeping on a chair."
SEED = 7
GUIDANCE = 4.0


@dataclass(frozen=True)
class Size:
    """A model and the picture it draws; numbers by the names of the official classes and of transformers.

    Args:
        flux, ae: `FluxParams` and `AutoEncoderParams`.
        t5, clip, siglip: their configurations.
        style_tokens: of each of the three levels.
        side: width and height of the picture; content_long_size: of its content picture, in pixels.
        steps, rounds: drawn by default.
    """

    flux: Mapping[str, Any]
    ae: Mapping[str, Any]
    t5: Mapping[str, Any]
    clip: Mapping[str, Any]
    siglip: Mapping[str, Any]
    lora_rank: int
    style_tokens: int
    side: tuple[int, int]
    content_long_size: int
    steps: int
    rounds: int

    @property
    def siglip_tokens(self) -> int:
        return (self.siglip["image_size"] // self.siglip["patch_size"]) ** 2


FLUX = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": True,
}
AE = {
    "in_channels": 3,
    "ch": 128,
    "out_ch": 3,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_channels": 16,
    "scale_factor": 0.3611,
    "shift_factor": 0.1159,
}
T5 = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
CLIP = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "eos_token_id": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}
FULL = Size(
    flux=FLUX,
    ae=AE,
    t5=T5,
    clip=CLIP,
    siglip=SIGLIP,
    lora_rank=128,
    style_tokens=64,
    side=(1024, 1024),
    content_long_size=512,
    steps=25,
    rounds=2,
)
# Encoders and autoencoder small enough that their share of the work is about that of the full model.
MID = Size(
    flux=FLUX
    | {
        "vec_in_dim": 128,
        "context_in_dim": 512,
        "hidden_size": 768,
        "num_heads": 6,
        "depth": 4,
        "depth_single_blocks": 8,
    },
    ae=AE | {"ch": 32},
    t5=T5 | {"d_model": 512, "d_ff": 1024, "num_heads": 8, "num_layers": 6, "vocab_size": 256},
    clip=CLIP
    | {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "projection_dim": 128,
        "vocab_size": 574,
    },
    siglip=SIGLIP
    | {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 3,
        "num_hidden_layers": 21,
        "image_size": 224,
        "patch_size": 14,
    },
    lora_rank=32,
    style_tokens=64,
    side=(512, 512),
    content_long_size=256,
    steps=4,
    rounds=3,
)


def _tiny() -> Size:
    """The model of `tests/goldens`."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((GOLDENS / name / "config.json").read_text(encoding="utf-8"))

    numbers = read(".")
    return Size(
        flux=numbers["flux"] | {"guidance_embed": True},
        ae=numbers["ae"],
        t5=read("t5"),
        clip=read("clip")["text_config"],
        siglip=read("siglip")["vision_config"],
        lora_rank=numbers["lora_rank"],
        style_tokens=numbers["style_tokens_per_layer"],
        side=(96, 80),
        content_long_size=96,
        steps=25,
        rounds=9,
    )


SIZES = {"tiny": _tiny(), "mid": MID, "full": FULL}


def random_tensor(name: str, shape: tuple[int, ...], *, device: str, dtype: torch.dtype) -> Tensor:
    """The tensor that a file would hold under `name`: as large as at the start of a training.

    Depends on name, shape and kind of device alone; versions of transformers differ in a prefix, not counted.
    """
    for prefix in ("text_model.", "vision_model."):
        name = name.removeprefix(prefix)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=device)
    if name.endswith("bias"):
        values *= 0.02
    elif len(shape) == 1:  # a norm's
        values = 1 + 0.1 * values
    elif "embed" not in name or "embedding_linear" in name:
        values *= 1 / math.sqrt(math.prod(shape[1:]))
    return values.to(dtype)


def picture(name: str) -> Image.Image:
    """A soft random picture, 400 x 400, by its name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    colours = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((400, 400), Image.Resampling.BICUBIC)


def write_folder(size: Size, folder: Path) -> None:
    """The layout that users download, with configurations and tokenizers; weight files are empty."""
    numbers = {"flux": dict(size.flux), "ae": dict(size.ae), "style_tokens_per_layer": size.style_tokens}
    (folder / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
    for name in ("flux1-dev", "ae", "dit_lora", "projector"):
        (folder / f"{name}.safetensors").touch()
    for name in ("t5", "clip"):
        # the goldens' tokenizers: ids below 574, which every vocabulary has
        shutil.copytree(
            GOLDENS / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
        )
    (folder / "siglip").mkdir()
    for name in ("t5", "clip", "siglip"):
        config = json.dumps(dict(getattr(size, name)))
        (folder / name / "config.json").write_text(config, encoding="utf-8")
        (folder / name / "model.safetensors").touch()


@dataclass
class Request:
    """One picture to draw."""

    steps: int
    seed: int = SEED
    content: Image.Image = field(default_factory=lambda: picture("content"))
    styles: list[Image.Image] = field(default_factory=lambda: [picture("style"), picture("second style")])
