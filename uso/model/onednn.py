"""A transformer's float32 products by oneDNN, on the same weights; torch leaves them to MKL, slower on AMD.

Compiled blocks, and gradients, keep torch's own.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

# a layer of fewer inputs or outputs is no faster, unless GELU follows
WIDTH = 256


def use_onednn(transformer: FluxTransformer2DModel) -> None:
    """Have its large layers, and those before GELU, computed by oneDNN, the latter together with it."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in transformer.modules():
        if type(module) is nn.Linear and min(module.weight.shape) >= WIDTH:
            _take(module)
        elif type(module) is FluxSingleTransformerBlock:
            _take(module.proj_mlp)
        elif type(module) is GELU and module.approximate == "tanh":
            _take(module.proj)
            module.forward = MethodType(_gelu, module)


def _take(layer: nn.Module) -> None:
    if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
        layer.forward = MethodType(_linear, layer)  # type: ignore[method-assign]


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU, by tanh, of what `layer` makes of `x`: one operation if oneDNN has both."""
    if _computes(x) and getattr(layer.forward, "__func__", None) is _linear and not _hooked(layer):
        return _product(layer, x, "gelu", "tanh")
    return F.gelu(layer(x), approximate="tanh")


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
