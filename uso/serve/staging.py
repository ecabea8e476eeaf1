"""Weights on the device only while they are needed: the memory modes `staged` and `offload`.

Their home is the CPU, which they never leave: the device gets copies and drops them, nothing is copied back.
The modulation layers stay at home: `uso.model.once` runs them before the steps.
"""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

from uso.model.modes import LARGE_COMPONENTS, blocks, modulation_layers, tensors


class Staging:
    """Lets the parts of `pipe` lie on `device` one at a time, from the CPU, where all of them are.

    `pipe.remove_all_hooks()`, after `release`, ends it.

    Args:
        by_blocks: also the blocks of the `LARGE_COMPONENTS` one at a time.
    """

    def __init__(self, pipe: Any, device: torch.device, *, by_blocks: bool) -> None:
        self.device = device
        self.brought: list[_Stage] = []  # the part that runs, then its block
        at_home = {tensor for layer in modulation_layers(pipe.transformer) for tensor in tensors(layer)}
        for name, component in pipe.components.items():
            if not isinstance(component, torch.nn.Module):
                continue
            own = [tensor for tensor in tensors(component) if tensor not in at_home]
            for block in blocks(component) if by_blocks and name in LARGE_COMPONENTS else ():
                weights = [tensor for tensor in tensors(block) if tensor not in at_home]
                own = [tensor for tensor in own if tensor not in {*weights}]
                add_hook_to_module(block, _Stage(self, weights, depth=1))
            add_hook_to_module(component, _Stage(self, own, depth=0))

    @property
    def bytes(self) -> int:
        """Of weights on the device now."""
        return sum(tensor.nbytes for stage in self.brought for tensor in stage.weights)

    def bring(self, stage: "_Stage") -> None:
        if stage in self.brought:
            return
        self.release(stage.depth)
        self.brought.append(stage)  # first, so that what fits in part is released too
        stage.home = [tensor.data for tensor in stage.weights]
        for tensor in stage.weights:
            tensor.data = tensor.to(self.device, copy=True)

    def release(self, depth: int = 0) -> None:
        """Free the device of parts (0) or of blocks alone (1)."""
        while len(self.brought) > depth:
            stage = self.brought.pop()
            for tensor, home in zip(stage.weights, stage.home, strict=True):
                tensor.data = home
            stage.home = []


class _Stage(ModelHook):
    """Brings `weights` before its module runs."""

    def __init__(self, staging: Staging, weights: list[Tensor], *, depth: int) -> None:
        self.staging, self.weights, self.depth = staging, weights, depth
        self.home: list[Tensor] = []
        self.execution_device = staging.device  # by which diffusers' pipelines know where to compute

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.staging.bring(self)
        return args, kwargs
