"""The transformer made faster for a device, its pictures the same but for rounding.

In this order: LoRAs are merged, weights quantized, q, k and v fused where they are not, blocks compiled.
"""

import ctypes
import logging
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from PIL import Image
from torch import nn

from uso.model.attention import FUSED, CPUAttnProcessor
from uso.model.onednn import use_onednn

logger = logging.getLogger(__name__)

# mallopt(3), by malloc.h's numbers: one arena for all threads (M_ARENA_MAX), for others always map large
# buffers; none is mapped (M_MMAP_THRESHOLD); none is given back when it is freed (M_TRIM_THRESHOLD)
MALLOPT = {-8: 1, -3: 2**31 - 1, -1: 2**31 - 1}


class Fused(nn.Module):
    """In a fused layer's place, so that peft refuses a LoRA on it, which would have no effect."""

    def extra_repr(self) -> str:
        return "fused with others: call unfuse_qkv_projections() before a LoRA is loaded"


def fuse_qkv(transformer: FluxTransformer2DModel) -> None:
    """Replace q, k and v of each attention by one layer; the three are not kept.

    Attentions with a LoRA beside them or with quantized weights stay as they are.
    """
    for attention in _attentions(transformer):
        layers = [getattr(attention, name, None) for names in FUSED.values() for name in names]
        if all(layer is None or type(layer) is nn.Linear for layer in layers):
            attention.fuse_projections()  # copies
            for fused, names in FUSED.items():
                for name in names if hasattr(attention, fused) else ():
                    setattr(attention, name, Fused())
            attention.requires_grad_(False)


def split_qkv(transformer: FluxTransformer2DModel) -> bool:
    """Undo `fuse_qkv`, bit for bit; whether there was something to undo."""
    fused = [attention for attention in _attentions(transformer) if attention.fused_projections]
    for attention in fused:
        for whole, names in FUSED.items():
            if not hasattr(attention, whole):
                continue
            layer = getattr(attention, whole)
            biases = [None] * 3 if layer.bias is None else layer.bias.chunk(3)
            for name, weight, bias in zip(names, layer.weight.chunk(3), biases, strict=True):
                outputs, inputs = weight.shape
                part = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
                part.weight = nn.Parameter(weight.clone(), requires_grad=False)
                if bias is not None:
                    part.bias = nn.Parameter(bias.clone(), requires_grad=False)
                setattr(attention, name, part)
        attention.unfuse_projections()
    return bool(fused)


def _attentions(transformer: FluxTransformer2DModel) -> Iterator[Any]:
    return (module for module in transformer.modules() if isinstance(module, FluxAttention))


def attention_backends(device: torch.device) -> tuple[str, ...]:
    """diffusers' attention backends for `device`, the fastest first; the last is always there."""
    if device.type == "cuda" and (generation := torch.cuda.get_device_capability(device)[0]) >= 9:
        hopper = ("_flash_3_hub",) if generation == 9 else ()
        return (*hopper, "_native_cudnn", "native")
    return ("native",)


def tune(transformer: FluxTransformer2DModel, device: torch.device) -> None:
    """What pays on `device` from the first picture on. On a CPU fusing does not: it gains 1 % of a step."""
    if device.type == "cuda":
        fuse_qkv(transformer)
        backend = choose_attention(transformer, attention_backends(device), device)
        logger.info("Attention backend: %s", backend)
    elif device.type == "cpu":
        keep_buffers()
        use_onednn(transformer)
        for attention in _attentions(transformer):
            if type(attention.processor) is FluxAttnProcessor:
                attention.set_processor(CPUAttnProcessor())


def keep_buffers() -> None:
    """Have glibc keep what is freed: else each buffer's pages are made anew, a third of the decoder's time.

    For the whole process, between two calls of `give_back`; under another C library nothing happens.
    """
    if libc := _glibc():
        for parameter, value in MALLOPT.items():
            libc.mallopt(parameter, value)


def give_back() -> None:
    """Return what `keep_buffers` had kept to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def choose_attention(
    transformer: FluxTransformer2DModel, backends: Sequence[str], device: torch.device
) -> str:
    """Set the first of `backends` that computes on `device`; the log says why others did not."""
    config = transformer.config
    shape = (1, 64, config.num_attention_heads, config.attention_head_dim)
    trial = torch.zeros(shape, device=device, dtype=transformer.dtype)
    *faster, last = backends
    for backend in faster:
        try:
            transformer.set_attention_backend(backend)
            dispatch_attention_fn(trial, trial, trial, backend=AttentionBackendName(backend))
        except Exception as error:  # of any kind: kernels come from the hub
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.info("The attention backend %s is not used: %s", backend, reason)
        else:
            return backend
    if faster:
        transformer.set_attention_backend(last)
    return last


def compile_blocks(pipe: Any, **options: Any) -> None:
    """Compile each kind of block, by drawing a small picture; the graphs are the same for all pictures.

    Where there is no compiler, nothing changes, and the log says why.

    Args:
        pipe: a `USOPipeline`.
        options: of `torch.compile`.
    """
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, **options)
    try:
        # with a reference: without one the last block's tokens end where all do, which would be another graph
        pipe(
            content_image=Image.new("RGB", (128, 96)), content_long_size=128, width=256, height=256,
            num_inference_steps=1, generator=torch.Generator(), output_type="latent",
        )  # fmt: skip
    except Exception as error:  # of any kind: compilers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("The blocks are not compiled: %s", reason)
        uncompile_blocks(pipe.transformer)


def is_compiled(transformer: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in transformer.modules())


def uncompile_blocks(transformer: FluxTransformer2DModel) -> None:
    for module in transformer.modules():
        module._compiled_call_impl = None
