"""What each part's file must look like: its model on the meta device, built from numbers, and its key map.

Configurations come from `FluxVariant`, or from the config.json of a folder that has one.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel

from uso.errors import CheckpointError
from uso.model import keymaps
from uso.model.keymaps import Shape, Source
from uso.model.style_projector import StyleProjector
from uso.model.variants import PUBLISHED_ENCODERS, FluxVariant
from uso.model.weights import Plan, Weights, read_json

# What a folder may hold beside the model that is taken from it.
LEFTOVERS = {
    "t5": re.compile(r"decoder\.|lm_head\.weight$|encoder\.embed_tokens\.weight$"),
    "clip": re.compile(
        r"vision_model\.|visual_projection\.weight$|text_projection\.weight$|logit_scale$"
        r"|text_model\.embeddings\.position_ids$"
    ),
    "siglip": re.compile(r"text_model\.|logit_scale$|logit_bias$|vision_model\.embeddings\.position_ids$"),
}
ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "clip": CLIPTextModel, "siglip": SiglipVisionModel}
# Component of a diffusers folder -> its class, or the name of the encoder.
COMPONENTS: dict[str, Any] = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "style_projector": StyleProjector,
    "text_encoder": "clip",
    "text_encoder_2": "t5",
    "image_encoder": "siglip",
}


def _parameter_shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _on_meta(model_class: Any, config: Any) -> Any:
    # buffers that no file holds (position ids) are computed for real
    with init_empty_weights(include_buffers=False):
        return model_class.from_config(config) if isinstance(config, dict) else model_class(config)


def transformer_plan(variant: FluxVariant) -> Plan:
    """FLUX in BFL's layout."""
    config = {
        "patch_size": 1,
        "in_channels": variant.in_channels,
        "num_layers": variant.depth,
        "num_single_layers": variant.depth_single_blocks,
        "attention_head_dim": variant.hidden_size // variant.num_heads,
        "num_attention_heads": variant.num_heads,
        "joint_attention_dim": variant.context_in_dim,
        "pooled_projection_dim": variant.vec_in_dim,
        "guidance_embeds": variant.guidance_embed,
        "axes_dims_rope": variant.axes_dim,
    }
    model = _on_meta(FluxTransformer2DModel, config)
    return Plan(model, keymaps.transformer_keys(variant), _parameter_shapes(model))


def autoencoder_plan(variant: FluxVariant) -> Plan:
    """FLUX's autoencoder in BFL's layout."""
    ae = variant.ae
    levels = len(ae.ch_mult)
    config = {
        "in_channels": ae.in_channels,
        "out_channels": ae.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [ae.ch * m for m in ae.ch_mult],
        "layers_per_block": ae.num_res_blocks,
        "latent_channels": ae.z_channels,
        "sample_size": 1024,
        "scaling_factor": ae.scale_factor,
        "shift_factor": ae.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    model = _on_meta(AutoencoderKL, config)
    shapes = _parameter_shapes(model)
    return Plan(model, keymaps.autoencoder_keys(variant, shapes), shapes)


def _prefixed(prefix: str) -> Callable[[Mapping[str, Shape]], dict[str, str]]:
    return lambda names: {name: prefix + name.removeprefix(prefix) for name in names}


def projector_plan(variant: FluxVariant, siglip: Any) -> Plan:
    """USO's projector between SigLIP (its vision config) and the transformer; names with or without prefix.

    Raises:
        CheckpointError: SigLIP has too few layers.
    """
    config = {
        "hidden_size": variant.hidden_size,
        "siglip_width": siglip.hidden_size,
        "siglip_tokens": (siglip.image_size // siglip.patch_size) ** 2,
        "tokens_per_level": variant.style_tokens_per_level,
    }
    model: Any = _on_meta(StyleProjector, config)
    needed = -min(model.config.levels) - 1
    if siglip.num_hidden_layers < needed:
        raise CheckpointError(f"SigLIP has {siglip.num_hidden_layers} layers; the projector needs {needed}.")
    shapes = _parameter_shapes(model)
    prefix = "feature_embedder."  # ComfyUI's loader takes files with and without
    return Plan(model, {prefix + name: Source((name,)) for name in shapes}, shapes, _prefixed(prefix))


def lora_plan(variant: FluxVariant, weights: Weights) -> Plan:
    """USO's LoRA by its official or ComfyUI names; its rank is that of most of its matrices."""
    transformer = transformer_plan(variant)
    names = _official_lora_names(weights.shapes)
    ranks = Counter(
        shape[0] for raw, shape in weights.shapes.items() if names[raw].endswith(".down.weight") and shape
    )
    if not ranks:
        raise CheckpointError(
            f"{weights.path} holds no USO LoRA: it has no .down.weight or .lora_down.weight."
        )
    keys = keymaps.lora_keys(variant)
    shapes = keymaps.lora_shapes(keys, transformer.shapes, rank=ranks.most_common(1)[0][0])
    return Plan(transformer.model, keys, shapes, _official_lora_names)


def _official_lora_names(names: Mapping[str, Shape]) -> dict[str, str]:
    return {name: keymaps.official_lora_name(name) for name in names}


def encoder_plan(name: str, folder: Path) -> Plan:
    """T5, CLIP's text tower or SigLIP's vision tower ("t5", "clip", "siglip"), by its config.json."""
    model_class = ENCODERS[name]
    model = _on_meta(model_class, _encoder_config(model_class, folder))
    shapes = _parameter_shapes(model)
    if name == "t5":
        keys = {key: Source((key,)) for key in shapes}
        keys["shared.weight"] = Source(
            ("shared.weight", keys.pop("encoder.embed_tokens.weight").targets[0]), "copy"
        )
        return Plan(model, keys, shapes, _t5_names, LEFTOVERS[name])
    # Files of the whole model and of the tower alone, and versions of transformers, differ in this prefix.
    prefix = {"clip": "text_model.", "siglip": "vision_model."}[name]
    keys = {prefix + key.removeprefix(prefix): Source((key,)) for key in shapes}
    return Plan(model, keys, shapes, _prefixed(prefix), LEFTOVERS[name])


def _t5_names(names: Mapping[str, Shape]) -> dict[str, str]:
    """The token embedding has two names, of which a file may have either or both."""
    tied = {} if "shared.weight" in names else {"encoder.embed_tokens.weight": "shared.weight"}
    return {name: tied.get(name, name) for name in names}


def _encoder_config(model_class: Any, folder: Path) -> Any:
    read_json(folder / "config.json")
    try:
        return model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # validation of another library
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe {model_class.__name__}: {error}"
        ) from error


def official_plan(name: str, variant: FluxVariant, paths: Mapping[str, Path], weights: Weights) -> Plan:
    """Plan of one part (`uso.model.sources.parts`) with `weights`; "projector" needs the path of "siglip".

    Raises:
        CheckpointError: it is not of the kind or size that `variant` was trained with.
    """
    if name == "transformer":
        return transformer_plan(variant)
    if name == "ae":
        return autoencoder_plan(variant)
    if name == "lora":
        return lora_plan(variant, weights)
    if name == "projector":
        if "siglip" not in paths:
            raise CheckpointError(f"{weights.path} cannot be judged without SigLIP, which gives its size.")
        return projector_plan(variant, _encoder_config(SiglipVisionModel, paths["siglip"]))
    plan = encoder_plan(name, paths[name])
    width = {"t5": variant.context_in_dim, "clip": variant.vec_in_dim}.get(name)
    if width is not None and (got := plan.model.config.hidden_size) != width:
        raise CheckpointError(f"{paths[name]} has width {got}; {variant.name} expects {width}.")
    return plan


def published_components(variant: FluxVariant, known: Mapping[str, Any] = {}) -> dict[str, Any]:
    """USO on `variant`, on the meta device, by the names of `COMPONENTS`.

    The encoders are those that are `known`, by the names of `ENCODERS`, the others as published.
    """
    encoders = {
        name: known.get(name) or _on_meta(model_class, model_class.config_class(**PUBLISHED_ENCODERS[name]))
        for name, model_class in ENCODERS.items()
    }
    encoders["t5"].tie_weights()
    siglip = encoders["siglip"].config
    return {
        "transformer": transformer_plan(variant).model,
        "vae": autoencoder_plan(variant).model,
        "style_projector": projector_plan(variant, siglip).model,
        **{part: encoders[name] for part, name in COMPONENTS.items() if isinstance(name, str)},
    }


def component_plan(name: str, folder: Path) -> Plan:
    """Plan of one of `COMPONENTS` of a diffusers folder, by its config.json."""
    model_class, folder = COMPONENTS[name], folder / name
    if isinstance(model_class, str):
        return encoder_plan(model_class, folder)
    read_json(folder / "config.json")
    model = _on_meta(model_class, model_class.load_config(folder, local_files_only=True))
    shapes = _parameter_shapes(model)
    return Plan(model, {key: Source((key,)) for key in shapes}, shapes)
