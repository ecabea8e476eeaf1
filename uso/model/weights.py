"""Checkpoint files, and the strict way from them into a model.

Headers are compared with what the model expects before a tensor is read: missing, unexpected, unpaired and
wrongly shaped keys are all listed in one `CheckpointError` that names the file.
"""

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uso.errors import CheckpointError
from uso.model import keymaps
from uso.model.keymaps import KeyMap, Shape

Advance = Callable[[int], None]

LISTED_KEYS = 40
PICKLE_NAME = "pytorch_model.bin"
WEIGHT_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Ready-made fp8 and int8 files carry scales, by any of these names, that the official code ignores: noise.
SCALE_KEY = re.compile(r"scaled_fp8|(scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$")
QUANTIZED = re.compile(r"F8|F6|F4|I8|U8|I4")


@dataclass(frozen=True)
class Weights:
    """Names and shapes in one checkpoint of one or several files; tensors are read one at a time.

    Args:
        path: the file or folder, as messages call it.
        shapes: of all tensors.
        files: safetensors files; empty for a pickle.
        pickled: tensors of a pickle, mapped into memory.
    """

    path: Path
    shapes: Mapping[str, Shape]
    files: tuple[Path, ...] = ()
    pickled: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes on the disk, or in a pickle's tensors."""
        return sum(file.stat().st_size for file in self.files) + sum(t.nbytes for t in self.pickled.values())

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.pickled.items()
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    yield name, file.get_tensor(name)


def open_weights(path: Path, *, allow_pickle: bool = False) -> Weights:
    """Read the header of a safetensors file, or of those of a model folder.

    Args:
        path: a file, or a folder with one of `WEIGHT_NAMES` or its index.
        allow_pickle: take a folder's pytorch_model.bin when there are no safetensors, by torch's restricted
            unpickler.

    Raises:
        CheckpointError: absent, damaged, quantized, GGUF, or a pickle.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. Correct the path; hub ids are not accepted in its place."
        )
    files = _weight_files(path) if path.is_dir() else (path,)
    if files == (path / PICKLE_NAME,) and allow_pickle:
        return _open_pickle(path)
    shapes: dict[str, Shape] = {}
    for file in files:
        shapes |= _read_header(file)
    return Weights(path, shapes, files)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            if absent := [n for n in names if not (folder / n).is_file()]:
                raise CheckpointError(
                    f"{folder} lacks {', '.join(absent)}, named in {index.name}. Download again."
                )
            return tuple(folder / n for n in names)
    if (folder / PICKLE_NAME).is_file():
        return (folder / PICKLE_NAME,)
    raise CheckpointError(
        f"{folder} has no weights: neither {' nor '.join(WEIGHT_NAMES)}. Download it again."
    )


def _read_header(path: Path) -> dict[str, Shape]:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"GGUF":
        raise CheckpointError(
            f"{path} is a GGUF file: its weights are quantized in blocks that this program does not read. "
            f"Use the published bf16 .safetensors file."
        )
    # A safetensors file begins with eight bytes of length, which may look like anything, and a brace.
    if path.suffix in PICKLE_ENDINGS or (start[8:] != b"{" and start.startswith((b"PK", b"\x80"))):
        raise CheckpointError(
            f"{path} is a Python pickle, which can run any code when opened. Only {PICKLE_NAME} in local T5 "
            f"and CLIP folders is accepted. Use a .safetensors file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            shapes = {name: tuple(part.get_shape()) for name, part in header.items()}
            kinds = Counter(part.get_dtype() for part in header.values())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete .safetensors file ({error}). Download it again."
        ) from error
    quantized = sorted(kind for kind in kinds if QUANTIZED.match(kind))
    if quantized or any(SCALE_KEY.search(name) for name in shapes):
        found = ", ".join(quantized) or "scale tensors"
        raise CheckpointError(
            f"{path} is quantized ({found}): ready-made fp8 and int8 files scale their tensors each in their "
            f"own way, and read as plain weights they give noise. Use the published bf16 file."
        )
    return shapes


def _open_pickle(folder: Path) -> Weights:
    path = folder / PICKLE_NAME
    try:
        # files older than torch 1.6 are no zip archives and cannot be mapped
        mmap = zipfile.is_zipfile(path)
        pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # UnpicklingError for forbidden code, many kinds for damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} was refused: it is damaged or holds more than plain tensors, and nothing in it was run "
            f"({reason}). Use a .safetensors file."
        ) from error
    if not isinstance(pickled, dict) or not all(isinstance(v, Tensor) for v in pickled.values()):
        raise CheckpointError(f"{path} does not hold plain tensors. Use a .safetensors file.")
    return Weights(folder, {k: tuple(v.shape) for k, v in pickled.items()}, pickled=pickled)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    return value


@dataclass(frozen=True)
class Plan:
    """A model on the meta device and what its file must look like.

    Args:
        model: what is filled; for a LoRA the model it belongs to.
        keys: official name -> parameters.
        shapes: of the parameters.
        rename: names in the file to official names, given all of them.
        leftovers: keys in the file that are not ours and allowed.
    """

    model: Any
    keys: KeyMap
    shapes: Mapping[str, Shape]
    rename: Callable[[Mapping[str, Shape]], dict[str, str]] = lambda names: {name: name for name in names}
    leftovers: re.Pattern[str] | None = None


def match(plan: Plan, weights: Weights) -> dict[str, str]:
    """Names in the file -> official names.

    Raises:
        CheckpointError: lists every missing, unexpected, unpaired and wrongly shaped key.
    """
    expected = {name: keymaps.source_shape(source, plan.shapes) for name, source in plan.keys.items()}
    names: dict[str, str] = {}
    raw_names: dict[str, str] = {}
    problems = []
    for raw, name in plan.rename(weights.shapes).items():
        if name not in expected or name in raw_names:
            if not (plan.leftovers and plan.leftovers.match(raw)):
                problems.append(f"unexpected: {raw}")
            continue
        names[raw], raw_names[name] = name, raw
        if weights.shapes[raw] != expected[name]:
            problems.append(f"wrong shape: {raw} has {weights.shapes[raw]}, expected {expected[name]}")
    for name in expected.keys() - raw_names.keys():
        partner = name.replace(".down.", ".up.") if ".down." in name else name.replace(".up.", ".down.")
        unpaired = partner != name and partner in raw_names
        problems.append(
            f"unpaired: {raw_names[partner]} is without {name}" if unpaired else f"missing: {name}"
        )
    if problems:
        listed = sorted(problems)[:LISTED_KEYS]
        more = [f"... and {len(problems) - LISTED_KEYS} more"] if len(problems) > LISTED_KEYS else []
        raise CheckpointError(
            "\n".join([f"{weights.path} does not fit: {len(problems)} keys are wrong.", *listed, *more])
        )
    return names


def read_state(plan: Plan, weights: Weights, *, dtype: torch.dtype, advance: Advance) -> dict[str, Tensor]:
    """Compare, then read the parameters; `advance` is told the bytes read.

    They are copies: the file may be changed or deleted afterwards.
    """
    names = match(plan, weights)
    state: dict[str, Tensor] = {}
    for raw, tensor in weights.tensors():
        if raw in names:
            parameters = keymaps.convert(plan.keys[names[raw]], tensor, plan.shapes)
            state |= {name: value.to(dtype, copy=True) for name, value in parameters.items()}
        advance(tensor.nbytes)
    return state


def load_strict(plan: Plan, weights: Weights, *, dtype: torch.dtype, advance: Advance) -> Any:
    """Fill `plan.model` from `weights`; it comes back on the CPU and in eval mode."""
    plan.model.load_state_dict(
        read_state(plan, weights, dtype=dtype, advance=advance), strict=True, assign=True
    )
    return plan.model.eval()
