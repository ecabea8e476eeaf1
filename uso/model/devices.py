"""Where to compute: one choice for page, command line and doctor."""

import torch

from uso.errors import InputError


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
