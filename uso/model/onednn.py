"""A transformer's float32 products by oneDNN, on the same weights, where torch's own are slower.

Torch's are MKL's. With AVX2 both are at the processor's rate. With AVX-512 oneDNN makes GELU at once with the
product before it; and MKL has AVX-512 on Intel's processors only. Compiled blocks, and gradients, keep MKL's.
"""

import platform
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

# a layer of fewer inputs or outputs is no faster, unless GELU follows
WIDTH = 256
CPUINFO = Path("/proc/cpuinfo")  # Linux's; elsewhere the processor's name has its vendor


def use_onednn(transformer: FluxTransformer2DModel) -> None:
    """Have the layers that it is faster at computed by oneDNN: those before GELU, together with it, and on
    AMD's processors the other large ones."""
    if not has_avx512():
        return
    large = made_by_amd()
    for module in transformer.modules():
        if large and type(module) is nn.Linear and min(module.weight.shape) >= WIDTH:
            _take(module)
        elif type(module) is FluxSingleTransformerBlock:
            _take(module.proj_mlp)
        elif type(module) is GELU and module.approximate == "tanh":
            _take(module.proj)
            module.forward = MethodType(_gelu, module)


def has_avx512() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def made_by_amd() -> bool:
    return "AuthenticAMD" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


def _take(layer: nn.Module) -> None:
    if _is_product(layer):
        layer.forward = MethodType(_linear, layer)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU, by tanh, of what `layer` makes of `x`: one operation if oneDNN has both."""
    if _computes(x) and getattr(layer.forward, "__func__", None) is _linear and not _hooked(layer):
        return _product(layer, x, "gelu", "tanh")
    return F.gelu(layer(x), approximate="tanh")


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is torch's own float32 product and nothing beside it."""
    return _is_product(layer) and "forward" not in vars(layer) and not _hooked(layer)


def _is_product(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.dtype == torch.float32


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _product(layer, x) if _computes(x) else F.linear(x, layer.weight, layer.bias)


def _gelu(module: GELU, x: Tensor) -> Tensor:
    return linear_gelu(module.proj, x)


def _computes(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.is_cpu and x.dtype == torch.float32


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _product(layer: nn.Module, x: Tensor, after: str = "none", kind: str = "") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, after, [], kind)
    return product
