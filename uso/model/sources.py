"""Where weights come from: files and folders on this machine, or the hub. Nothing is opened here.

A source is "nano" (bundled), "flux-dev", "flux-krea-dev" or "flux-schnell" (the files that the official
repository's .env names point to, the rest from the hub), a diffusers folder, a folder of official or
ComfyUI-repackaged files, or one transformer file in such a folder.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import get_token, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionResolutionError,
)

from uso.errors import CheckpointError
from uso.model.variants import (
    APACHE,
    DEV,
    REVISIONS,
    SIGLIP_REPO,
    USO_REPO,
    VARIANTS,
    FluxVariant,
    with_numbers_of,
)
from uso.settings import Settings, environment_name

NANO = "nano"
NANO_DIR = Path(__file__).parents[2] / "assets" / "nano"
DIFFUSERS_INDEX = "model_index.json"
GB = 1e9


@dataclass(frozen=True)
class Part:
    """One download of the official set-up.

    Args:
        settings_fields: settings that may hold its path, the first one set wins.
        patterns: where it lies in a folder (official downloader, goldens, ComfyUI), best first.
        repo, path: on the hub; `path` is a file, or a folder ("" for the repository's top).
        tokenizer: folder of the tokenizer on the hub, beside `path`; on this machine also `path` itself.
        gated: the repository asks to accept a licence first.
        size: bytes of the published download.
        parameters: numbers that are used of it.
    """

    name: str
    settings_fields: tuple[str, ...]
    patterns: tuple[str, ...]
    repo: str
    path: str
    licence: str
    size: float
    parameters: float
    tokenizer: str = ""
    gated: bool = False


def parts(variant: FluxVariant) -> tuple[Part, ...]:
    """Everything USO on `variant` is made of."""
    return (
        Part(
            name="transformer",
            settings_fields=variant.settings_fields,
            # the last one finds fp8 and GGUF files, for which there is a better answer than "not found"
            patterns=(variant.file_name, f"*/{variant.file_name}", f"{Path(variant.file_name).stem}*"),
            repo=variant.hub_id,
            path=variant.file_name,
            licence=variant.licence,
            size=23.8 * GB,
            parameters=11.9e9,
            gated=variant.gated,
        ),
        Part(
            name="lora",
            settings_fields=("lora",),
            patterns=_uso_patterns("dit_lora", "uso-flux1-dit-lora"),
            repo=USO_REPO,
            path="uso_flux_v1.0/dit_lora.safetensors",
            licence=APACHE,
            size=0.48 * GB,
            parameters=0.24e9,
        ),
        Part(
            name="projector",
            settings_fields=("projection_model",),
            patterns=_uso_patterns("projector", "uso-flux1-projector"),
            repo=USO_REPO,
            path="uso_flux_v1.0/projector.safetensors",
            licence=APACHE,
            size=0.02 * GB,
            parameters=0.01e9,
        ),
        Part(
            name="ae",
            settings_fields=("ae",),
            patterns=("ae.safetensors", "*/ae.safetensors"),
            repo=variant.hub_id,
            path="ae.safetensors",
            licence=variant.licence,
            size=0.34 * GB,
            parameters=0.084e9,
            gated=variant.gated,
        ),
        Part(
            name="t5",
            settings_fields=("t5",),
            patterns=("t5", "t5-xxl"),
            repo=variant.text_hub_id,
            path="text_encoder_2",
            licence=APACHE,
            size=9.5 * GB,
            parameters=4.76e9,
            tokenizer="tokenizer_2",
            gated=variant.gated,
        ),
        Part(
            name="clip",
            settings_fields=("clip",),
            patterns=("clip", "clip-vit-l14"),
            repo=variant.text_hub_id,
            path="text_encoder",
            licence="MIT",
            size=0.25 * GB,
            parameters=0.123e9,
            tokenizer="tokenizer",
            gated=variant.gated,
        ),
        Part(
            name="siglip",
            settings_fields=("siglip_path",),
            patterns=("siglip",),
            repo=SIGLIP_REPO,
            path="",
            licence=APACHE,
            size=3.5 * GB,
            parameters=0.43e9,
        ),
    )


def _uso_patterns(official: str, comfy: str) -> tuple[str, ...]:
    name = f"uso_flux_v1.0/{official}.safetensors"
    return (f"{official}.safetensors", name, f"*/{name}", f"{comfy}*.safetensors", f"*/{comfy}*.safetensors")


@dataclass(frozen=True)
class Located:
    """A source, as far as it is on this machine.

    Args:
        variant: its architecture; None for a diffusers folder, which describes itself.
        paths: part name -> file or folder that was named or found; it need not exist. A diffusers folder
            has one entry, "pipeline".
        missing: parts that have none.
        hub: whether the missing ones may come from the hub.
    """

    name: str
    variant: FluxVariant | None
    paths: Mapping[str, Path]
    missing: tuple[Part, ...] = ()
    hub: bool = False

    @property
    def diffusers_folder(self) -> Path | None:
        return self.paths.get("pipeline")


def locate(source: str | Path, settings: Settings) -> Located:
    """Find the parts of `source`.

    Raises:
        CheckpointError: there is no such source, or its config.json is wrong.
    """
    if source == NANO:
        return Located(NANO, None, {"pipeline": NANO_DIR})
    if variant := VARIANTS.get(str(source)):
        named = {
            part.name: path
            for part in parts(variant)
            if (path := next((p for f in part.settings_fields if (p := getattr(settings, f))), None))
        }
        if "transformer" in named:
            variant = with_numbers_of(variant, named["transformer"].parent)
        return _located(variant.name, variant, named, hub=True)
    path = Path(source).expanduser()
    if path.is_file():
        folder, variant = path.parent, _variant_of_file(path)
        found = {"transformer": path}
    elif (path / DIFFUSERS_INDEX).is_file():
        return Located(str(source), None, {"pipeline": path})
    elif path.is_dir():
        folder, found = path, {}
        variant = next((v for v in VARIANTS.values() if _find(parts(v)[0], path)), DEV)
    else:
        raise CheckpointError(
            f"There is no model {str(source)!r}: neither a file or folder nor one of "
            f"{', '.join((NANO, *VARIANTS))}."
        )
    for part in parts(variant):
        if part.name not in found and (hit := _find(part, folder)):
            found[part.name] = hit
    return _located(
        str(source), with_numbers_of(variant, found.get("transformer", path).parent), found, hub=False
    )


def _located(name: str, variant: FluxVariant, paths: Mapping[str, Path], *, hub: bool) -> Located:
    missing = tuple(part for part in parts(variant) if part.name not in paths)
    return Located(name, variant, paths, missing, hub)


def _variant_of_file(path: Path) -> FluxVariant:
    """By the published file name; any other name is taken for a fine-tune of dev."""
    return next((v for v in VARIANTS.values() if path.name.startswith(Path(v.file_name).stem)), DEV)


def _find(part: Part, folder: Path) -> Path | None:
    return next((hit for pattern in part.patterns for hit in sorted(folder.glob(pattern))), None)


def how_to_provide(part: Part, located: Located) -> str:
    """What the user can do about a missing part."""
    variable = environment_name(part.settings_fields[0])
    if located.hub:
        return f"set {variable} to it, or let it be downloaded from https://huggingface.co/{part.repo}"
    return (
        f"put {part.patterns[0]} there (https://huggingface.co/{part.repo}), or choose a model by name and "
        f"set {variable}"
    )


def require_complete(located: Located) -> None:
    """Raise one CheckpointError that lists every missing part and what to do."""
    if located.missing:
        lines = [f"- {part.name}: {how_to_provide(part, located)}" for part in located.missing]
        raise CheckpointError("\n".join([f"{located.name} is incomplete:", *lines]))


def tokenizer_folder(part: Part, path: Path) -> Path:
    """Official T5 and CLIP folders hold their tokenizer; diffusers' have it beside them."""
    beside = path.parent / part.tokenizer
    return beside if beside.is_dir() and path.name == part.path else path


def hub_token(settings: Settings) -> str | None:
    """HF_TOKEN of the settings, else what `hf auth login` has stored."""
    return settings.hf_token.get_secret_value() if settings.hf_token else get_token()


def hub_patterns(part: Part) -> list[str]:
    """What to take of a part that is a folder on the hub: safetensors only."""
    model = f"{part.path}/" if part.path else ""
    patterns = [f"{model}*.safetensors", f"{model}*.json"]
    return [*patterns, f"{part.tokenizer}/*"] if part.tokenizer else patterns


def _is_file(part: Part) -> bool:
    return part.path.endswith(".safetensors")


def cached(part: Part) -> Path | None:
    """Path of a part that was downloaded before, without asking the hub; None if it is not complete."""
    probe = part.path if _is_file(part) else f"{part.path}/config.json".lstrip("/")
    hit = try_to_load_from_cache(part.repo, probe, revision=REVISIONS[part.repo])
    if not isinstance(hit, str):
        return None
    return Path(hit) if _is_file(part) else Path(hit).parent


def download(part: Part, settings: Settings) -> Path:
    """The part from the hub, at its revision, with huggingface_hub's progress bar; resumes what was begun.

    Raises:
        CheckpointError: gated, wrong token, offline or broken off, with what to do.
    """
    revision, token = REVISIONS[part.repo], hub_token(settings)
    page = f"https://huggingface.co/{part.repo}"
    try:
        if _is_file(part):
            return Path(hf_hub_download(part.repo, part.path, revision=revision, token=token))
        snapshot = snapshot_download(
            part.repo, revision=revision, allow_patterns=hub_patterns(part), token=token
        )
        return Path(snapshot) / part.path
    except GatedRepoError as error:
        have = "HF_TOKEN is set, but its account has" if token else "HF_TOKEN is not set; you have"
        raise CheckpointError(
            f"{part.repo} is gated: {have} no access to it. Sign in at {page} and accept its licence, make "
            f"a token that may read gated repositories at https://huggingface.co/settings/tokens, and put it "
            f"as HF_TOKEN into the environment or .env."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub does not show {part.repo}: HF_TOKEN is probably wrong or expired. Correct or remove it."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise CheckpointError(
            f"{part.name} is not on this machine and the hub cannot be reached. Connect to the internet (and "
            f"unset HF_HUB_OFFLINE), or download {page} elsewhere and set "
            f"{environment_name(part.settings_fields[0])} to it."
        ) from error
    except (
        Exception
    ) as error:  # whatever the hub's HTTP library raises, which is not the same in all its versions
        raise CheckpointError(
            f"The download of {part.repo} broke off ({type(error).__name__}: {error}). Start again: it "
            f"resumes."
        ) from error


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    return bool(hub_constants.HF_HUB_OFFLINE)


def hub_cache_folder() -> Path:
    """Where downloads go; it or one of its parents exists."""
    return Path(os.path.expanduser(hub_constants.HF_HUB_CACHE))
