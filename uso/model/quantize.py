"""Transformer and T5 in 8 or 4 bit, by SDNQ: in the weights alone, which are widened for each product."""

from typing import Any

import torch

from uso.errors import InputError
from uso.model.modes import LARGE_COMPONENTS, Quantization, quantized_layers

SDNQ_TYPES = {"int8": "int8", "int4": "uint4"}


def quantize(pipe: Any, kind: Quantization, *, device: torch.device) -> None:
    """Quantize the `LARGE_COMPONENTS` of `pipe` in place, its LoRA merged; a layer at a time on `device`.

    Raises:
        InputError: neither CUDA nor a CPU, which alone it was tried on.
    """
    if kind == "none":
        return
    if device.type not in ("cuda", "cpu"):
        raise InputError(
            f"--quantize {kind} has not been tried on {device.type}: leave it out, or take --device cpu."
        )
    # at its import it tries a compilation: a minute on a CPU
    with torch._dynamo.config.patch(disable=device.type == "cpu"):
        import sdnq
    for name in LARGE_COMPONENTS:
        component = getattr(pipe, name)
        taken = quantized_layers(component, kind)
        sdnq.sdnq_post_load_quant(
            component,
            weights_dtype=SDNQ_TYPES[kind],
            modules_dtype_dict={
                "int8": [f"{name}.weight" for name, (_, own) in taken.items() if own == "int8"]
            },
            modules_to_not_convert=[
                f"{name}.weight" for name, _ in component.named_modules() if name not in taken
            ],
            add_skip_keys=False,
            dequantize_fp32=False,  # in float32 the scales would weigh an eighth more in 4 bit
            torch_dtype=component.dtype,
            quantization_device=device,
            return_device="cpu",
        )
