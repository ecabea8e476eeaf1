"""Names of published checkpoints and the parameters of our classes they stand for. No file is opened here.

A key map is `{name in the file: Source}`. Shapes in the file follow from those of the parameters
(`source_shape`), so that a map and a model on the meta device say everything about a checkpoint. Names:
black-forest-labs/flux `src/flux/model.py` and `modules/autoencoder.py`, bytedance/USO
`uso/flux/modules/layers.py`, Comfy-Org/ComfyUI `comfy/lora_convert.py` (`convert_uso_lora`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uso.model.variants import FluxVariant

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What one tensor of a file holds.

    Args:
        targets: the parameters made of it.
        how: "split": its rows are those of the targets, one after another. "swap": one target, with the
            halves of its rows exchanged. "copy": each target is the whole tensor. "conv": a 1x1 convolution
            that is a linear layer in the target.
    """

    targets: tuple[str, ...]
    how: Literal["split", "swap", "copy", "conv"] = "split"


KeyMap = Mapping[str, Source]


def source_shape(source: Source, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of the tensor in the file, from the `shapes` of the parameters."""
    first = shapes[source.targets[0]]
    if source.how == "split" and first:
        return (sum(shapes[t][0] for t in source.targets), *first[1:])
    return (*first, 1, 1) if source.how == "conv" else first


def convert(source: Source, tensor: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The parameters in `tensor`; views where possible. `tensor` must have the shape `source_shape` says."""
    if source.how == "copy":
        return dict.fromkeys(source.targets, tensor)
    if source.how == "swap":
        return {source.targets[0]: torch.cat(tensor.chunk(2)[::-1])}
    if source.how == "conv":
        return {source.targets[0]: tensor[..., 0, 0]}
    if len(source.targets) == 1:
        return {source.targets[0]: tensor}
    return dict(zip(source.targets, tensor.split([shapes[t][0] for t in source.targets]), strict=True))


def transformer_keys(variant: FluxVariant) -> dict[str, Source]:
    """BFL's `Flux` to diffusers' `FluxTransformer2DModel`."""
    keys: dict[str, Source] = {}

    def linear(name: str, *targets: str, how: Literal["split", "swap"] = "split") -> None:
        for end in ("weight", "bias"):
            keys[f"{name}.{end}"] = Source(tuple(f"{t}.{end}" for t in targets), how)

    def scale(name: str, target: str) -> None:
        keys[f"{name}.scale"] = Source((f"{target}.weight",))

    linear("img_in", "x_embedder")
    linear("txt_in", "context_embedder")
    embedders = {
        "time_in": "timestep_embedder",
        "vector_in": "text_embedder",
        "guidance_in": "guidance_embedder",
    }
    for name, target in embedders.items():
        if name != "guidance_in" or variant.guidance_embed:
            linear(f"{name}.in_layer", f"time_text_embed.{target}.linear_1")
            linear(f"{name}.out_layer", f"time_text_embed.{target}.linear_2")
    for i in range(variant.depth):
        block, to = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, suffix, qkv, out, added in (
            ("img", "", ("to_q", "to_k", "to_v"), "to_out.0", ""),
            ("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "added_"),
        ):
            linear(f"{block}.{stream}_mod.lin", f"{to}.norm1{suffix}.linear")
            linear(f"{block}.{stream}_attn.qkv", *(f"{to}.attn.{x}" for x in qkv))
            scale(f"{block}.{stream}_attn.norm.query_norm", f"{to}.attn.norm_{added}q")
            scale(f"{block}.{stream}_attn.norm.key_norm", f"{to}.attn.norm_{added}k")
            linear(f"{block}.{stream}_attn.proj", f"{to}.attn.{out}")
            linear(f"{block}.{stream}_mlp.0", f"{to}.ff{suffix}.net.0.proj")
            linear(f"{block}.{stream}_mlp.2", f"{to}.ff{suffix}.net.2")
    for i in range(variant.depth_single_blocks):
        block, to = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        linear(f"{block}.modulation.lin", f"{to}.norm.linear")
        linear(
            f"{block}.linear1", *(f"{to}.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        )
        scale(f"{block}.norm.query_norm", f"{to}.attn.norm_q")
        scale(f"{block}.norm.key_norm", f"{to}.attn.norm_k")
        linear(f"{block}.linear2", f"{to}.proj_out")
    # BFL's last modulation gives (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift)
    linear("final_layer.adaLN_modulation.1", "norm_out.linear", how="swap")
    linear("final_layer.linear", "proj_out")
    return keys


def autoencoder_keys(variant: FluxVariant, parameters: Mapping[str, Shape]) -> dict[str, Source]:
    """BFL's `AutoEncoder` to diffusers' `AutoencoderKL`, whose `parameters` are given."""
    last = len(variant.ae.ch_mult) - 1
    keys = {}
    for target in parameters:
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", target)
        name = re.sub(r"down_blocks\.", "down.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
        name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = name.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("conv_norm_out", "norm_out")
        conv = re.search(r"attentions\.0\.to_.*weight$", target)
        keys[name] = Source((target,), "conv" if conv else "split")
    return keys


def lora_keys(variant: FluxVariant) -> dict[str, Source]:
    """USO's LoRA, a down and an up matrix for each fused layer, to peft's `lora_A` and `lora_B`."""
    layers: dict[str, tuple[str, ...]] = {}
    for i in range(variant.depth):
        to = f"transformer_blocks.{i}.attn"
        # 1 is the image stream, 2 the text stream
        layers[f"double_blocks.{i}.processor.qkv_lora1"] = (f"{to}.to_q", f"{to}.to_k", f"{to}.to_v")
        layers[f"double_blocks.{i}.processor.proj_lora1"] = (f"{to}.to_out.0",)
        layers[f"double_blocks.{i}.processor.qkv_lora2"] = (
            f"{to}.add_q_proj",
            f"{to}.add_k_proj",
            f"{to}.add_v_proj",
        )
        layers[f"double_blocks.{i}.processor.proj_lora2"] = (f"{to}.to_add_out",)
    for i in range(variant.depth_single_blocks):
        to = f"single_transformer_blocks.{i}"
        layers[f"single_blocks.{i}.processor.qkv_lora"] = tuple(f"{to}.attn.to_{x}" for x in "qkv")
        # over attention and MLP output together
        layers[f"single_blocks.{i}.processor.proj_lora"] = (f"{to}.proj_out",)
    keys: dict[str, Source] = {}
    for name, targets in layers.items():
        keys[f"{name}.down.weight"] = Source(tuple(f"{t}.lora_A.weight" for t in targets), "copy")
        keys[f"{name}.up.weight"] = Source(tuple(f"{t}.lora_B.weight" for t in targets))
    return keys


def lora_shapes(keys: KeyMap, parameters: Mapping[str, Shape], *, rank: int) -> dict[str, Shape]:
    """Shapes of peft's matrices named in `keys`, for layers of the transformer with these `parameters`."""
    shapes: dict[str, Shape] = {}
    for target in (t for source in keys.values() for t in source.targets):
        layer, _, end = target.rpartition(".lora_")
        rows, columns = parameters[f"{layer}.weight"]
        shapes[target] = (rank, columns) if end == "A.weight" else (rows, rank)
    return shapes


COMFY_LORA = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1_qkv": "processor.qkv_lora",
    # a lora of linear1 whose up matrix has 3h rows: shapes are checked
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}
COMFY_ENDS = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up"}


def official_lora_name(name: str) -> str:
    """Official name of a LoRA key that may be ComfyUI's; any other name comes back as it is."""
    name = name.removeprefix("diffusion_model.")
    match = re.fullmatch(r"((?:double|single)_blocks\.\d+)\.(.+)\.(\w+)\.weight", name)
    if match and match[2] in COMFY_LORA and match[3] in COMFY_ENDS:
        return f"{match[1]}.{COMFY_LORA[match[2]]}.{COMFY_ENDS[match[3]]}.weight"
    return name
