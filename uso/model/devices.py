"""Where to compute, and what of the model lies there: one choice for page, command line and doctor."""

from collections.abc import Callable

import torch

from uso.errors import InputError
from uso.model.modes import MEMORY_MODES, Footprint, MemoryMode, choose_memory


def choose_device(name: str) -> torch.device:
    """The device that `name` means, tried out; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: it cannot be used on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"The device {name} cannot be used here ({reason}): set --device or USO_DEVICE to another, "
            "or to auto."
        ) from error


def memory_modes(device: torch.device) -> tuple[MemoryMode, ...]:
    """Those that `device` has: elsewhere than on CUDA there is one memory, and nothing to move."""
    return MEMORY_MODES if device.type == "cuda" else MEMORY_MODES[:1]


def pick_memory(
    memory: str, device: torch.device, footprint: Callable[[], Footprint]
) -> tuple[MemoryMode, str]:
    """The memory mode that the setting `memory` means on `device`, and why, in one line."""
    modes = memory_modes(device)
    if len(modes) == 1:
        instead = "" if memory in ("auto", "full") else f", {memory} would save nothing"
        return "full", f"{device.type} has no memory of its own{instead}"
    if memory != "auto":
        return modes[modes.index(memory)], "as set"
    free, _ = torch.cuda.mem_get_info(device)
    return choose_memory(footprint(), free)
