"""The base models USO runs on: one record each, what differs by `dataclasses.replace`.

Numbers and names as in black-forest-labs/flux (`FluxParams`, `AutoEncoderParams`); files and hub ids as in
bytedance/USO `uso/flux/util.py`.
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from uso.errors import CheckpointError

# Commits of the hub repositories that were looked at. Those of the two below are not known to us: they follow
# the branch, so a change there would reach our users.
UNPINNED = "main"
REVISIONS = {
    "black-forest-labs/FLUX.1-dev": "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    "black-forest-labs/FLUX.1-Krea-dev": UNPINNED,
    "black-forest-labs/FLUX.1-schnell": "741f7c3ce8b383c54771c7003378a50191e9efe9",
    "bytedance-research/USO": UNPINNED,
    "google/siglip-so400m-patch14-384": "9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
}

USO_REPO = "bytedance-research/USO"
SIGLIP_REPO = "google/siglip-so400m-patch14-384"
APACHE = "Apache-2.0"
FLUX_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"

# What diffusers' FluxTransformer2DModel has written into its code.
FIXED_BY_DIFFUSERS = {"mlp_ratio": 4.0, "theta": 10_000, "qkv_bias": True}


# The published encoders' config.json, as far as it gives shapes: T5 v1.1 XXL, CLIP-L, SigLIP so400m.
PUBLISHED_ENCODERS: dict[str, dict[str, int | str]] = {
    "t5": {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "clip": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
    },
    "siglip": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip


@dataclass(frozen=True)
class AutoencoderShape:
    """Numbers of the BFL autoencoder."""

    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


@dataclass(frozen=True)
class FluxVariant:
    """A base model: its architecture, where it comes from and under which licence."""

    name: str
    hub_id: str
    file_name: str
    # the first one that is set wins; names of `Settings` fields
    settings_fields: tuple[str, ...]
    licence: str
    gated: bool = True
    # where T5, CLIP and their tokenizers come from
    text_hub_id: str = "black-forest-labs/FLUX.1-dev"

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    ae: AutoencoderShape = AutoencoderShape()
    style_tokens_per_level: int = 64


Record = TypeVar("Record", FluxVariant, AutoencoderShape)

DEV = FluxVariant(
    name="flux-dev",
    hub_id="black-forest-labs/FLUX.1-dev",
    file_name="flux1-dev.safetensors",
    settings_fields=("flux_dev", "flux_dev_fp8"),
    licence=FLUX_DEV_LICENCE,
)
KREA = replace(
    DEV,
    name="flux-krea-dev",
    hub_id="black-forest-labs/FLUX.1-Krea-dev",
    file_name="flux1-krea-dev.safetensors",
    settings_fields=("flux_krea_dev",),
)
# Its own repository holds the same T5, CLIP and autoencoder: nobody need accept the dev licence for it.
SCHNELL = replace(
    DEV,
    name="flux-schnell",
    hub_id="black-forest-labs/FLUX.1-schnell",
    file_name="flux1-schnell.safetensors",
    settings_fields=("flux_schnell",),
    licence=APACHE,
    gated=False,
    text_hub_id="black-forest-labs/FLUX.1-schnell",
    guidance_embed=False,
)
VARIANTS = {variant.name: variant for variant in (DEV, KREA, SCHNELL)}


def with_numbers_of(variant: FluxVariant, folder: Path) -> FluxVariant:
    """`variant` with the numbers of `folder`/config.json, if there is one that describes a BFL model.

    The file has `{"flux": {...}, "ae": {...}, "style_tokens_per_layer": n}`; what it leaves out stays.
    Published checkpoints come without it.

    Raises:
        CheckpointError: unreadable, a number we do not know, or one that diffusers' FLUX cannot have.
    """
    path = folder / "config.json"
    if not path.is_file():
        return variant
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(numbers, dict) or "flux" not in numbers:
        return variant
    variant = _replace(variant, numbers["flux"], path)
    for name, value in FIXED_BY_DIFFUSERS.items():
        if getattr(variant, name) != value:
            raise CheckpointError(f"{path}: {name} is {getattr(variant, name)}; diffusers' FLUX has {value}.")
    return replace(
        variant,
        ae=_replace(variant.ae, numbers.get("ae", {}), path),
        style_tokens_per_level=numbers.get("style_tokens_per_layer", variant.style_tokens_per_level),
    )


def _replace(record: Record, numbers: dict[str, Any], path: Path) -> Record:
    known = {f.name for f in dataclasses.fields(record)}
    if unknown := sorted(numbers.keys() - known):
        raise CheckpointError(f"{path} has numbers we do not know: {', '.join(unknown)}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
    return replace(record, **values)
