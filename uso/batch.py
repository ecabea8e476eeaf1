"""What one `generate` call is to make: every picture, where it goes, and whether it is there already.

All is checked before a model is loaded, and every problem is told, not only the first. A batch file is a JSON
list or one JSON object a line, of our field names or of the official evaluation format
(`{"prompt": ..., "image_paths": [content, style, second style]}`, "" for none; `inference.py` of
bytedance/USO). As there, relative paths start at the batch file's folder and pictures are named
`<item>_<image>.png`, counted from 0, with `save_dir` (or `id`) in place of the item's number; the seed of an
item's pictures counts up. Imports no torch.
"""

import functools
import hashlib
import json
import random
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uso.errors import InputError
from uso.images import open_image, prepare_content
from uso.metadata import describe, read_parameters
from uso.schema import SEED_MAX, URI_SCHEMES, GenerationRequest, parse_request, resolve_size

IMAGE_FIELDS = tuple(name for name in GenerationRequest.model_fields if name.endswith("_image"))
ID_KEYS = ("id", "save_dir")
# Parts of letters, digits and "_.-" that begin with no dot: nothing leads out of the output folder.
_GAP = re.compile(r"[\s,]*")
_ID = re.compile(r"(?=.{1,100}$)\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class Job:
    """One picture to make.

    Args:
        origin: begins every message about it: "FILE line 3: ", empty without a batch file.
        request: with the seed drawn.
        output: the PNG to write.
        parameters: what goes into the PNG, with the size and the pictures' hashes (`uso.metadata.describe`).
        sizes: (width, height) of the request's pictures, by field.
        note: what the user should be told about the size.
    """

    origin: str
    request: GenerationRequest
    output: Path
    parameters: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, int]]
    note: str | None


@dataclass
class Plan:
    """Pictures to make, pictures that are there already, and what is wrong (then nothing is to be made).

    `flags` (field -> value) hold for what an entry of a batch file leaves out; `model` is the name that goes
    into the pictures' parameters, as do the `lossy` settings.
    """

    flags: Mapping[str, Any]
    num_images: int
    model: str
    overwrite: bool
    lossy: Mapping[str, Any] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inspect = functools.cache(_inspect)  # one picture serves many entries
        self._outputs: set[str] = set()

    def add_single(self, output: Path) -> None:
        """One picture into the file `output`, or `num_images` with `_0`, `_1`, ... before its `.png`."""
        if output.suffix.lower() != ".png":
            raise InputError(f"`--output` must end in .png without --batch, got {str(output)!r}.")
        numbers = [""] if self.num_images == 1 else [f"_{k}" for k in range(self.num_images)]
        self._add("", self.flags, [output.with_stem(output.stem + number) for number in numbers])

    def add_batch(self, batch: Path, folder: Path) -> None:
        """`num_images` pictures into `folder` for each entry of the file `batch`.

        Raises InputError where the file as a whole cannot be used.
        """
        if folder.suffix.lower() == ".png":
            raise InputError(f"`--output` must be a folder with --batch, got {str(folder)!r}.")
        try:
            rows = list(_rows(batch.read_text("utf-8-sig")))
        except json.JSONDecodeError as error:
            raise InputError(f"{batch} line {error.lineno}: not JSON ({error.msg}).") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"`--batch` {str(batch)!r} cannot be read: {error}.") from error
        if not rows:
            raise InputError(f"`--batch` {str(batch)!r} has no entries.")
        for index, (line, text) in enumerate(rows):
            origin = f"{batch} line {line}: "
            try:
                fields, name = _read_entry(text, batch.parent)
            except InputError as error:
                self.problems.append(f"{origin}{error}")
                continue
            outputs = [folder / f"{name or index}_{k}.png" for k in range(self.num_images)]
            self._add(origin, {**self.flags, **fields}, outputs)

    def _add(self, origin: str, fields: Mapping[str, Any], outputs: list[Path]) -> None:
        try:
            first = parse_request(dict(fields))
            seeds = _seeds(first.seed, len(outputs))
            for seed, output in zip(seeds, outputs, strict=True):
                job = self._job(origin, parse_request({**fields, "seed": seed}), output)
                if (key := str(output).casefold()) in self._outputs:
                    raise InputError(f"{output} is the output of another entry: give another {ID_KEYS[0]}.")
                self._outputs.add(key)
                (self.done if self._is_there(job, any_seed=first.seed == -1) else self.jobs).append(job)
        except (InputError, OSError) as error:
            self.problems.append(f"{origin}{error}")

    def _job(self, origin: str, request: GenerationRequest, output: Path) -> Job:
        """Look at the pictures and decide the size; InputError if it cannot be made."""
        hashes, sizes = {}, {}
        for name in IMAGE_FIELDS:
            if (reference := getattr(request, name)) is not None:
                long_size = request.content_long_size if name == "content_image" else None
                sizes[name], hashes[name] = self._inspect(reference.path, name, long_size)
        target = resolve_size(
            width=request.width,
            height=request.height,
            keep_size=request.keep_size,
            content_size=sizes.get("content_image"),
        )
        parameters = describe(
            request,
            width=target.width,
            height=target.height,
            seed=request.seed,
            model=self.model,
            image_sha256=hashes,
            lossy=self.lossy,
        )
        return Job(origin, request, output, parameters, sizes, target.note)

    def _is_there(self, job: Job, *, any_seed: bool) -> bool:
        """Whether the output exists with the job's parameters; InputError if it is another picture."""
        if self.overwrite or not job.output.exists():
            return False
        ignored = {"software", "seed"} if any_seed else {"software"}
        remedy = "choose another --output, or replace it with --overwrite."
        try:
            found = read_parameters(job.output)
        except InputError:
            raise InputError(f"{job.output} exists and was not made here: {remedy}") from None
        keys = [key for key in {**job.parameters, **found} if key not in ignored]
        if other := [key for key in keys if found.get(key) != job.parameters.get(key)]:
            raise InputError(f"{job.output} exists, made with another {', '.join(other)}: {remedy}")
        return True


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each entry of a list, or of each line that is not blank."""
    if not text.lstrip().startswith("["):
        yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    line, counted, position = 1, 0, text.index("[") + 1
    for _ in json.loads(text):
        start = _GAP.match(text, position).end()  # type: ignore[union-attr]  # matches anything
        line, counted = line + text.count("\n", counted, start), start
        _, position = json.JSONDecoder().raw_decode(text, start)
        yield line, text[start:position]


def _read_entry(text: str, folder: Path) -> tuple[dict[str, Any], str | None]:
    """The request's fields (picture paths are of `folder`) and the output's name, None if there is none."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "a batch file is a JSON list, or one JSON object a line."
        raise InputError(f"not JSON ({error}): {remedy}") from None
    if not isinstance(entry, dict):
        raise InputError(f"must be an object of fields, got {reprlib.repr(entry)}.")
    names = {key: entry.pop(key) for key in ID_KEYS if key in entry}
    for key, name in names.items():
        if type(name) not in (str, int) or not _ID.fullmatch(str(name)):
            raise InputError(
                f'`{key}` must be up to 100 letters, digits, "_", "-", "." and "/", got {reprlib.repr(name)}.'
            )
    if "image_paths" in entry:
        paths = entry.pop("image_paths")
        if not isinstance(paths, list) or len(paths) > len(IMAGE_FIELDS):
            raise InputError(
                f"`image_paths` must be a list of at most {len(IMAGE_FIELDS)} paths (content, style, second "
                f'style; "" for none), got {reprlib.repr(paths)}.'
            )
        # Evaluation files carry more keys (such as the expected picture), which the official code ignores.
        entry = {key: value for key, value in entry.items() if key in GenerationRequest.model_fields}
        entry |= dict.fromkeys(IMAGE_FIELDS) | dict(zip(IMAGE_FIELDS, paths, strict=False))
    pictures = {name: local_picture(name, entry[name], folder) for name in IMAGE_FIELDS if name in entry}
    return {**entry, **pictures}, str(next(iter(names.values()))) if names else None


def local_picture(name: str, value: Any, folder: Path) -> Any:
    """What `parse_request` takes for a picture: a path of `folder`, None for "", anything odd as it came."""
    path = value.get("uri", value.get("path")) if isinstance(value, dict) else value
    if not isinstance(path, str):
        return value
    if path.lower().startswith(URI_SCHEMES):
        raise InputError(
            f"`{name}` is a URL ({reprlib.repr(path)}): download the picture first and give the file's path.",
            field=name,
        )
    return {"path": str(folder / path)} if path else None


def _seeds(seed: int, count: int) -> list[int]:
    """`count` different seeds: random ones for -1, else counted up as the official code does."""
    if seed == -1:
        return random.SystemRandom().sample(range(SEED_MAX + 1), count)
    return list(range(seed, seed + count))


def _inspect(path: str, name: str, long_size: int | None) -> tuple[tuple[int, int], str]:
    """(width, height) and SHA-256 of a picture that can be used; `long_size` is that of a content picture."""
    picture = open_image(path, field=name)
    if long_size is not None:
        prepare_content(picture, long_size)
    return picture.size, hashlib.sha256(Path(path).read_bytes()).hexdigest()
