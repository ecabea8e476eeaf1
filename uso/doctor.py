"""`python -m uso doctor`: what is here, what is missing, and whether a picture could be made.

The checks are those of `load_pipeline`, made on the headers of the files: no tensor is read.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from uso.errors import CheckpointError, InputError
from uso.model import keymaps
from uso.model.checkpoints import (
    FLOAT32_PARTS,
    PICKLE_PARTS,
    default_dtype,
    require_our_folder,
    require_tokenizer,
)
from uso.model.devices import choose_device, pick_memory
from uso.model.modes import MEMORY_MODES, QUANTIZATIONS, TABLE, Footprint, Quantization
from uso.model.plans import (
    COMPONENTS,
    ENCODERS,
    component_plan,
    encoder_plan,
    official_plan,
    published_components,
)
from uso.model.sources import (
    DIFFUSERS_INDEX,
    GB,
    NANO,
    Located,
    Part,
    cached,
    how_to_provide,
    hub_cache_folder,
    hub_is_off,
    hub_token,
    locate,
    parts,
    tokenizer_folder,
)
from uso.model.variants import APACHE, FluxVariant
from uso.model.weights import Plan, Weights, match, open_weights, read_json
from uso.settings import Settings, get_settings

Origin = Literal["file", "hub cache", "hub", "missing"]

# Tokenizers of a diffusers folder -> the encoder whose input they make.
TOKENIZERS = {"tokenizer": "clip", "tokenizer_2": "t5"}


@dataclass(frozen=True)
class Row:
    """One part of a model.

    Args:
        path: file or folder; None if it is not on this machine.
        origin: "file", "hub cache", "hub" (comes at the first use) or "missing".
        size: bytes on the disk, or of the download.
        parameters: numbers that will be in memory.
        problem: why a picture cannot be made with it, and what to do; None if it can.
    """

    name: str
    path: Path | None
    origin: Origin
    size: float
    licence: str
    parameters: float = 0
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """What `report` found; `print(report)` shows it.

    Args:
        rows: the parts of the chosen source.
        machine: device and memory, one fact a line.
        plan: what would run.
        modes: the table of modes, a line a row.
        problems: what stands in the way, each with what to do.
    """

    rows: list[Row]
    machine: list[str]
    plan: str
    problems: list[str]
    modes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 when generation would work, else 1."""
        return 1 if self.problems else 0

    def __str__(self) -> str:
        table = [("part", "size", "licence", "from", "file or folder")]
        for row in self.rows:
            size = f"{row.size / GB:.2f} GB" if row.size >= GB / 10 else f"{row.size / 1e6:.1f} MB"
            table.append((row.name, size, row.licence, row.origin, str(row.path or "-")))
        lines = _aligned(table) if self.rows else []
        modes = ["", *self.modes] if self.modes else []
        verdict = ["It would not run:", *(f"- {problem}" for problem in self.problems)]
        return "\n".join(
            [*lines, "", *self.machine, self.plan, *modes, "", *(verdict if self.problems else ["Ready."])]
        )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]


def report(source: str | None = None, *, settings: Settings | None = None) -> Report:
    """Look at `source` (default: the settings' model) and at this machine."""
    settings = settings or get_settings()
    source = source or settings.model
    try:
        located = locate(source, settings)
        rows = _inspect_all(located, settings)
    except CheckpointError as error:
        return Report([], _machine(), f"model: {source}", [str(error)])
    problems = [f"{row.name}: {row.problem}" for row in rows if row.problem]
    dtype = default_dtype(located, settings)
    # While a LoRA is being merged both are in memory, for moments.
    need = sum(row.parameters * (4 if row.name in FLOAT32_PARTS else dtype.itemsize) for row in rows)
    try:
        device = choose_device(settings.device)
    except InputError as error:
        device = torch.device("cpu")
        problems.append(str(error))
    memory = psutil.virtual_memory()
    if need > memory.total:
        problems.append(
            f"the weights need {need / GB:.1f} GB of memory and this machine has {memory.total / GB:.1f} GB: "
            f"use a larger machine, or the model {NANO}"
        )
    download = sum(row.size for row in rows if row.origin == "hub")
    if download and (room := _free_disk(hub_cache_folder())) < download:
        problems.append(
            f"{download / GB:.1f} GB have to be downloaded and {hub_cache_folder()} has {room / GB:.1f} GB "
            f"free: make room, or set HF_HOME to a larger disk"
        )
    later = f", after a download of {download / GB:.1f} GB" if download else ""
    kind = str(dtype).removeprefix("torch.")
    plan = f"model: {located.name} in {kind} on {device}, {need / GB:.2g} GB of weights{later}"
    modes = [] if any(row.problem for row in rows) else _modes(located, rows, dtype, device, settings)
    return Report(rows, _machine(), plan, problems, modes)


def _modes(
    located: Located, rows: list[Row], dtype: torch.dtype, device: torch.device, settings: Settings
) -> list[str]:
    """What each mode would need here, and which memory mode would be taken."""
    components, numbers = _components(located, {row.name: row.path for row in rows if row.path})

    def footprint(quantize: Quantization = settings.quantize) -> Footprint:
        return Footprint.of(components, itemsize=dtype.itemsize, quantize=quantize, **numbers)

    memory, why = pick_memory(settings.memory, device, footprint)
    needs: dict[str, int] = {}
    for mode in MEMORY_MODES:
        needs[mode] = footprint().peak(mode, turbo=settings.turbo)
    for kind in QUANTIZATIONS:
        needs[kind] = footprint(kind).peak(memory, turbo=settings.turbo)
    needs["turbo"] = footprint().peak(memory, turbo=True)
    table = [("mode", "GB", "flag", "on", "what it does", "difference")]
    for row in TABLE:
        table.append((row.name, f"{needs[row.name] / GB:.2f}", row.flag, row.needs, row.recipe, row.loss))
    return [
        "the device's memory for a 1024x1024 picture of a subject in a style, other settings as they are:",
        *_aligned(table),
        f"here: {memory}, since {why}",
    ]


def _components(located: Located, paths: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's parts on meta, and the numbers of its pipeline that `Footprint` asks for."""
    if folder := located.diffusers_folder:
        components = {name: component_plan(name, folder).model for name in COMPONENTS}
        components["text_encoder_2"].tie_weights()
        index = read_json(folder / DIFFUSERS_INDEX)
        names = {
            "native_scale": "native_scale",
            "native_side": "native_side",
            "text_tokens": "max_sequence_length",
        }
        return components, {name: index[key] for name, key in names.items() if key in index}
    assert located.variant is not None  # only a diffusers folder has none
    known = {name: encoder_plan(name, paths[name]).model for name in ENCODERS if name in paths}
    return published_components(located.variant, known), {}


def _inspect_all(located: Located, settings: Settings) -> list[Row]:
    if folder := located.diffusers_folder:
        return _inspect_diffusers_folder(folder, licence=APACHE if located.name == NANO else "see its source")
    assert located.variant is not None  # only a diffusers folder has none
    paths = dict(located.paths)
    for part in located.missing if located.hub else ():
        if path := cached(part):
            paths[part.name] = path
    rows = []
    for part in parts(located.variant):
        if path := paths.get(part.name):
            row = Row(part.name, path, "file" if part.name in located.paths else "hub cache", 0, part.licence)
            rows.append(_checked(row, _part_check(part, located.variant, paths)))
        elif problem := _why_not_downloadable(part, located, settings):
            rows.append(Row(part.name, None, "missing", part.size, part.licence, part.parameters, problem))
        else:
            rows.append(Row(part.name, None, "hub", part.size, part.licence, part.parameters))
    # it is merged into the transformer
    return [replace(row, parameters=0) if row.name == "lora" else row for row in rows]


def _inspect_diffusers_folder(folder: Path, *, licence: str) -> list[Row]:
    require_our_folder(folder)
    rows = []
    for name in COMPONENTS:

        def check(name: str = name) -> tuple[Plan, Weights]:
            return component_plan(name, folder), open_weights(folder / name)

        rows.append(_checked(Row(name, folder / name, "file", 0, licence), check))
    for name, encoder in TOKENIZERS.items():
        try:
            require_tokenizer(encoder, folder / name)
        except CheckpointError as error:
            rows.append(Row(name, folder / name, "missing", 0, licence, problem=str(error)))
    return rows


def _checked(row: Row, check: Callable[[], tuple[Plan, Weights]]) -> Row:
    try:
        plan, weights = check()
        match(plan, weights)
    except CheckpointError as error:
        return replace(row, problem=str(error))
    parameters = sum(math.prod(keymaps.source_shape(s, plan.shapes)) for s in plan.keys.values())
    return replace(row, size=weights.size, parameters=parameters)


def _part_check(
    part: Part, variant: FluxVariant, paths: Mapping[str, Path]
) -> Callable[[], tuple[Plan, Weights]]:
    def check() -> tuple[Plan, Weights]:
        if part.tokenizer:
            require_tokenizer(part.name, tokenizer_folder(part, paths[part.name]))
        weights = open_weights(paths[part.name], allow_pickle=part.name in PICKLE_PARTS)
        return official_plan(part.name, variant, paths, weights), weights

    return check


def _why_not_downloadable(part: Part, located: Located, settings: Settings) -> str | None:
    remedy = how_to_provide(part, located)
    if not located.hub:
        return f"not found; {remedy}"
    if hub_is_off():
        return f"not on this machine, and HF_HUB_OFFLINE forbids the download; {remedy}"
    if part.gated and not hub_token(settings):
        token = "https://huggingface.co/settings/tokens"
        return (
            f"not on this machine; {remedy} (gated: accept its licence there, and set HF_TOKEN, from {token})"
        )
    return None


def _machine() -> list[str]:
    memory = psutil.virtual_memory()
    lines = [f"memory: {memory.available / GB:.1f} of {memory.total / GB:.1f} GB free"]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        lines.append(
            f"cuda:{i}: {torch.cuda.get_device_name(i)}, {free / GB:.1f} of {total / GB:.1f} GB free"
        )
    if torch.backends.mps.is_available():
        lines.append("mps: shares the machine's memory")
    if len(lines) == 1:
        lines.append(f"no GPU: the CPU's {torch.get_num_threads()} threads")
    return lines


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
