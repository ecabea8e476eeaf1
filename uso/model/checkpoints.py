"""Weights to a `USOPipeline`, by one function for every kind of source.

Nothing is repaired, guessed or left at its random start: see `uso.model.weights`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from uso.errors import CheckpointError
from uso.model.devices import choose_device
from uso.model.modes import Quantization
from uso.model.pipeline import USOPipeline
from uso.model.plans import COMPONENTS, component_plan, official_plan
from uso.model.quantize import quantize
from uso.model.scheduler import USOFlowMatchEulerScheduler
from uso.model.sources import (
    DIFFUSERS_INDEX,
    NANO,
    Located,
    download,
    locate,
    parts,
    require_complete,
    tokenizer_folder,
)
from uso.model.variants import FluxVariant
from uso.model.weights import Advance, Plan, Weights, load_strict, match, open_weights, read_json, read_state
from uso.settings import Settings, get_settings

Progress = Callable[[str, float], None]

LORA_ADAPTER = "uso"
# In float32 always, as in the official code.
FLOAT32_PARTS = ("siglip", "image_encoder")
# The only parts that may be a pickle.
PICKLE_PARTS = ("t5", "clip")


def load_pipeline(
    source: str | Path = NANO,
    *,
    settings: Settings | None = None,
    torch_dtype: torch.dtype | None = None,
    fuse_lora: bool = True,
    quantization: Quantization | None = None,
    progress: Progress | None = None,
) -> USOPipeline:
    """A pipeline on the CPU; `pipe.to(device)` moves it.

    Args:
        source: see `uso.model.sources`.
        settings: where files lie and the hub's token; default: the process's.
        torch_dtype: bfloat16 or float32; default: the settings', else bfloat16 and for nano float32. SigLIP
            is float32 always, as in the official code.
        fuse_lora: merge USO's LoRA into the transformer. False keeps it as the adapter "uso", which
            `save_pretrained` does not save. Without effect on a diffusers folder.
        quantization: of transformer and T5: "int8", "int4" or "none"; default: the settings'.
        progress: called with what is being done and the fraction done, in [0, 1]; downloads and loading count
            for themselves.

    Raises:
        CheckpointError: something is missing, damaged or does not fit, all of a file's faults in one message.
    """
    settings = settings or get_settings()
    located = locate(source, settings)
    dtype = torch_dtype or default_dtype(located, settings)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"`torch_dtype` must be torch.bfloat16 or torch.float32 (T5 overflows in float16), got {dtype}"
        )
    kind = quantization or settings.quantize
    if kind != "none" and not fuse_lora:
        raise ValueError("`quantization` needs the LoRA merged: leave out `fuse_lora=False`")
    report = progress or (lambda text, fraction: None)
    pipe = _load(located, dtype=dtype, fuse_lora=fuse_lora, progress=report, settings=settings)
    if kind != "none":
        report(f"Quantizing to {kind}", 1.0)
        quantize(pipe, kind, device=choose_device(settings.device))
    return pipe


def _load(
    located: Located, *, dtype: torch.dtype, fuse_lora: bool, progress: Progress, settings: Settings
) -> USOPipeline:
    if located.diffusers_folder:
        return _load_diffusers_folder(located.diffusers_folder, dtype=dtype, progress=progress)
    if not located.hub:
        require_complete(located)
    paths = dict(located.paths)
    for i, part in enumerate(located.missing):
        progress(f"Downloading {part.name} from {part.repo}", i / len(located.missing))
        paths[part.name] = download(part, settings)
    assert located.variant is not None  # only a diffusers folder has none
    return _load_official(located.variant, paths, dtype=dtype, fuse_lora=fuse_lora, progress=progress)


def default_dtype(located: Located, settings: Settings) -> torch.dtype:
    """bfloat16 for full models, float32 for nano, unless the settings say otherwise."""
    if settings.dtype == "auto":
        return torch.float32 if located.name == NANO else torch.bfloat16
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


@dataclass
class _Reading:
    """Progress over all bytes of a pipeline."""

    progress: Progress
    total: int
    done: int = 0

    def of(self, name: str) -> Advance:
        def advance(size: int) -> None:
            self.done += size
            self.progress(f"Loading {name}", min(self.done / self.total, 1.0))

        return advance


def _load_all(
    plans: Mapping[str, Plan], weights: Mapping[str, Weights], *, dtype: torch.dtype, progress: Progress
) -> dict[str, Any]:
    reading = _Reading(progress, sum(weights[name].size for name in plans))
    models = {}
    for name, plan in plans.items():
        kind = torch.float32 if name in FLOAT32_PARTS else dtype
        models[name] = load_strict(plan, weights[name], dtype=kind, advance=reading.of(name))
        if isinstance(models[name], T5EncoderModel):
            models[name].tie_weights()
    return models


def _load_official(
    variant: FluxVariant,
    paths: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    fuse_lora: bool,
    progress: Progress,
) -> USOPipeline:
    weights = {name: open_weights(path, allow_pickle=name in PICKLE_PARTS) for name, path in paths.items()}
    plans = {name: official_plan(name, variant, paths, weights[name]) for name in paths}
    for name, plan in plans.items():  # all that headers can tell, before gigabytes are read
        match(plan, weights[name])
    folders = {
        part.name: tokenizer_folder(part, paths[part.name]) for part in parts(variant) if part.tokenizer
    }
    tokenizers = {name: _load_tokenizer(name, folder) for name, folder in folders.items()}
    # openai's folder says 77 in tokenizer_config.json; without it the length would be unlimited
    tokenizers["clip"].model_max_length = plans["clip"].model.config.max_position_embeddings

    lora = read_state(plans.pop("lora"), weights["lora"], dtype=dtype, advance=lambda size: None)
    models = _load_all(plans, weights, dtype=dtype, progress=progress)
    models["transformer"].load_lora_adapter(lora, prefix=None, adapter_name=LORA_ADAPTER)
    if fuse_lora:
        models["transformer"].fuse_lora()
        models["transformer"].unload_lora()
    return USOPipeline(
        scheduler=USOFlowMatchEulerScheduler(),
        vae=models["ae"],
        text_encoder=models["clip"],
        tokenizer=tokenizers["clip"],
        text_encoder_2=models["t5"],
        tokenizer_2=tokenizers["t5"],
        transformer=models["transformer"],
        image_encoder=models["siglip"],
        style_projector=models["projector"],
    )


def _load_diffusers_folder(folder: Path, *, dtype: torch.dtype, progress: Progress) -> USOPipeline:
    require_our_folder(folder)
    weights = {name: open_weights(folder / name) for name in COMPONENTS}
    plans = {name: component_plan(name, folder) for name in COMPONENTS}
    for name, plan in plans.items():
        match(plan, weights[name])
    tokenizers = {
        "tokenizer": _load_tokenizer("clip", folder / "tokenizer"),
        "tokenizer_2": _load_tokenizer("t5", folder / "tokenizer_2"),
    }
    models = _load_all(plans, weights, dtype=dtype, progress=progress)
    index = read_json(folder / DIFFUSERS_INDEX)
    numbers = {
        name: index[name] for name in ("native_scale", "native_side", "max_sequence_length") if name in index
    }
    return USOPipeline(scheduler=_scheduler(folder / "scheduler"), **models, **tokenizers, **numbers)


def _scheduler(folder: Path) -> USOFlowMatchEulerScheduler:
    config = read_json(folder / "scheduler_config.json")
    scheduler: USOFlowMatchEulerScheduler = USOFlowMatchEulerScheduler.from_config(config)
    return scheduler


def require_our_folder(folder: Path) -> None:
    """Raise a CheckpointError unless `folder` holds a pipeline saved by `USOPipeline.save_pretrained`."""
    index = folder / DIFFUSERS_INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds no pipeline: {DIFFUSERS_INDEX} is missing. Choose another model."
        )
    if (kind := read_json(index).get("_class_name")) != USOPipeline.__name__:
        raise CheckpointError(
            f"{folder} holds a {kind}, not a {USOPipeline.__name__}. Use the folder of a pipeline that this "
            f"program saved, or the official files."
        )


def require_tokenizer(name: str, folder: Path) -> None:
    """Raise a CheckpointError if files of CLIP's or T5's tokenizer ("clip", "t5") are absent.

    transformers would make an empty tokenizer of such a folder.
    """
    needed = {"clip": ("vocab.json", "merges.txt"), "t5": ("spiece.model",)}[name]
    absent = [file for file in needed if not (folder / file).is_file()]
    if absent and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} lacks the tokenizer's {' and '.join(absent)}. Download it again.")


def _load_tokenizer(name: str, folder: Path) -> Any:
    require_tokenizer(name, folder)
    tokenizer_class: Any = {"clip": CLIPTokenizer, "t5": T5Tokenizer}[name]
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise CheckpointError(f"{folder} has no usable tokenizer ({error}). Download it again.") from error
