"""The one description of a request: page, API, command line and PNG text all read it.

Fields, order and limits are those of the hosted app. This module knows neither torch nor the web, and opens
no pictures: an `ImageRef` only says where one is.
"""

import difflib
import math
import reprlib
import secrets
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from uso.errors import InputError

SIDE_MIN, SIDE_MAX, SIDE_STEP = 512, 1536, 16
AUTO_LONG_SIDE = 1024  # long side of an inferred size, the side the model was trained on
PROMPT_MAX_CHARS = 4096  # T5 reads 512 tokens; what is longer cannot change the picture
SEED_MAX = 2**32 - 1
URI_SCHEMES = ("http://", "https://", "data:")


class ImageRef(BaseModel):
    """Where a picture is: a URL string, `{"uri": ...}` or `{"path": ...}`. Exactly one of both is set.

    Other keys of the dict (hosted clients send content_type, size, ...) are tolerated and dropped. Nothing is
    opened here; whoever serves decides which URLs and paths may be read.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    uri: str | None = None
    path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.uri is None) == (self.path is None):
            raise ValueError("give either uri or path")
        if self.uri is not None and not self.uri.lower().startswith(URI_SCHEMES):
            raise ValueError("not a URL")
        if not (self.uri or self.path) or "\0" in (self.uri or self.path or ""):
            raise ValueError("empty, or with a NUL character")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text = {"type": "string"}
        described = {"type": "object", "properties": {"uri": {**text, "format": "uri"}, "path": text}}
        one_of = [{"required": ["uri"]}, {"required": ["path"]}]
        return {"title": "Image", "anyOf": [{**text, "format": "uri"}, {**described, "oneOf": one_of}]}


def _only_numbers(value: Any) -> Any:
    """Pydantic alone would take true as 1 and "25" as 25; 25.0 stays fine, JSON has one number type."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError("not a number")
    return value


def _no_nul(value: Any) -> Any:
    if isinstance(value, str) and "\0" in value:
        raise ValueError("NUL character")
    return value


Integer = Annotated[int, BeforeValidator(_only_numbers)]
OptionalInteger = Annotated[int | None, BeforeValidator(_only_numbers)]
Number = Annotated[float, BeforeValidator(_only_numbers)]


def _flatten_optional(schema: dict[str, Any]) -> None:
    """`null` is accepted for an optional field, but published is `integer`, as in the hosted app's schema."""
    for field in schema["properties"].values():
        if "anyOf" in field:
            (inner,) = (option for option in field.pop("anyOf") if option != {"type": "null"})
            field.update(inner)
            field.pop("default")


class GenerationRequest(BaseModel):
    """One picture to make: a subject, in a style, as a prompt says."""

    # Titles are the page's words; descriptions are the help on the page, in the API and on the command line.
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_flatten_optional)

    prompt: Annotated[str, BeforeValidator(_no_nul)] = Field(
        title="Prompt",
        description="What the picture shows; empty keeps the subject's layout and only changes the style.",
        max_length=PROMPT_MAX_CHARS,
    )
    content_image: ImageRef | None = Field(
        default=None, title="Subject", description="The person, animal or thing that the picture is of."
    )
    style_image: ImageRef | None = Field(
        default=None, title="Style", description="The look the picture takes on: colours, strokes, material."
    )
    extra_style_image: ImageRef | None = Field(
        default=None, title="Second style", description="Another look to mix with the first (experimental)."
    )
    width: OptionalInteger = Field(
        default=None,
        title="Width",
        description="Width of the picture in pixels; left out, it follows the subject's shape.",
        ge=SIDE_MIN,
        le=SIDE_MAX,
        multiple_of=SIDE_STEP,
    )
    height: OptionalInteger = Field(
        default=None,
        title="Height",
        description="Height of the picture in pixels; left out, it follows the subject's shape.",
        ge=SIDE_MIN,
        le=SIDE_MAX,
        multiple_of=SIDE_STEP,
    )
    num_steps: Integer = Field(
        default=25, title="Steps", description="More steps draw finer detail and take longer.", ge=1, le=50
    )
    guidance: Number = Field(
        default=4.0,
        title="Guidance",
        description="Higher follows the prompt more strictly, lower looks more natural.",
        ge=1.0,
        le=5.0,
        allow_inf_nan=False,
        json_schema_extra={"step": 0.1},
    )
    seed: Integer = Field(
        default=-1,
        title="Seed",
        description="The same seed and settings draw the same picture again; -1 draws a new one each time.",
        ge=-1,
        le=SEED_MAX,
    )
    keep_size: StrictBool = Field(
        default=False,
        title="Keep the subject's shape",
        description="The picture gets the subject's shape (long side 1024, short side at least 512), "
        "whatever width and height say.",
    )
    content_long_size: Integer = Field(
        default=512,
        title="Subject detail",
        description="How many pixels of the subject's long side are looked at: more keeps more detail; "
        "0 takes the subject's own size, at most 1024.",
        ge=0,
        le=1024,
        json_schema_extra={"step": 16},
    )


def _constraints(name: str) -> dict[str, Any]:
    """The limits declared on a field: {"ge": .., "le": .., "multiple_of": ..}, as far as it has them."""
    metadata = GenerationRequest.model_fields[name].metadata
    keys = ("ge", "le", "multiple_of")
    return {key: getattr(item, key) for item in metadata for key in keys if hasattr(item, key)}


def bounds(name: str) -> dict[str, Any]:
    """`minimum`, `maximum` and `step` of a numeric field, ready for a slider: `gr.Slider(**bounds("width"))`.

    The step of width and height is a rule; that of the others is only a convenient one for a control.
    """
    limits = _constraints(name)
    extra = GenerationRequest.model_fields[name].json_schema_extra
    suggested = extra.get("step", 1) if isinstance(extra, dict) else 1
    return {
        "minimum": limits["ge"],
        "maximum": limits["le"],
        "step": limits.get("multiple_of", suggested),
    }


def parse_request(data: Any) -> GenerationRequest:
    """A request from outside (JSON, form, file); anything wrong is one `InputError` that lists every problem.

    Numbers with an integral value (25.0) count as integers; strings and booleans do not count as numbers.
    """
    if not isinstance(data, dict):
        raise InputError(f"The request must be an object of fields, got {reprlib.repr(data)}.")
    try:
        return GenerationRequest.model_validate(data)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for detail in error.errors():
            if not detail["loc"]:
                raise InputError("The name of a field has broken Unicode.") from None
            field = str(detail["loc"][0])
            if field not in problems:
                problems[field] = _sentence(field, detail, data.get(field))
        raise InputError(" ".join(problems.values()), field=next(iter(problems))) from None


def _sentence(field: str, detail: ErrorDetails, value: Any) -> str:
    """One problem in one sentence: the field, its limit, the value it got, what to do."""
    fields = GenerationRequest.model_fields
    got = reprlib.repr(value)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field[:40], fields, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(fields)}."
        return f"`{reprlib.repr(field)[1:-1]}` is not a field: {remedy}"
    if detail["type"] == "missing":
        return f'`{field}` is missing: give a text, "" for none.'
    if field == "prompt":
        if detail["type"] == "string_too_long":
            return f"`prompt` has {len(value)} characters, the limit is {PROMPT_MAX_CHARS}: shorten it."
        return f"`prompt` must be a text without NUL characters or broken Unicode, got {got}."
    if field == "keep_size":
        return f"`keep_size` must be true or false, got {got}."
    if field.endswith("_image"):
        return (
            f'`{field}` must be an http(s) or data URL, {{"uri": URL}} or {{"path": file}}, got {got}: '
            "give one of both, not empty."
        )
    limits = _constraints(field)
    low, high, step = limits["ge"], limits["le"], limits.get("multiple_of", 1)
    whole = fields[field].annotation is not float
    kind = "whole number" if whole else "number"
    steps = f" in steps of {step}" if step != 1 else ""
    rule = f"`{field}` must be a {kind} from {low:g} to {high:.10g}{steps}, got {got}"
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return f"{rule}: leave it out for the default."
    nearest = [min(max(value, low), high)]
    if whole:
        below = int(nearest[0] // step * step)
        nearest = [below] if below == nearest[0] else [below, below + step]
    return f"{rule}: try {' or '.join(format(number, '.10g') for number in nearest)}."


def draw_seed(seed: int) -> int:
    """The seed to use and to report: -1 becomes a random one in 0..2**32 - 1."""
    return secrets.randbelow(SEED_MAX + 1) if seed == -1 else seed


class Size(NamedTuple):
    """Size of the picture to make, in pixels, and what the user should be told about it."""

    width: int
    height: int
    note: str | None = None


def resolve_size(
    *, width: int | None, height: int | None, keep_size: bool, content_size: tuple[int, int] | None
) -> Size:
    """The size of the picture, from a valid request and the opened content picture's (width, height).

    Both sides given: taken. One: the other from the content's shape (no content: equal). None: the content's
    shape (no content: 1024x1024). keep_size with a content picture overrides the given sides (as the official
    `gradio_generate`); without one it does nothing, and the note says so. InputError where a shape does not
    fit into 512..1536.
    """
    if content_size is None:
        side = width or height or AUTO_LONG_SIDE
        note = "keep_size has no effect without a content picture." if keep_size else None
        return Size(width or side, height or side, note)
    if keep_size:
        note = None if width is None and height is None else "keep_size is on: width and height are not used."
        return Size(*_shape_of(content_size), note)
    if width and height:
        return Size(width, height)
    content_width, content_height = content_size
    if width:
        return Size(width, _other_side("height", "width", width, content_height / content_width))
    if height:
        return Size(_other_side("width", "height", height, content_width / content_height), height)
    return Size(*_shape_of(content_size))


def _shape_of(content_size: tuple[int, int]) -> tuple[int, int]:
    """Long side 1024, aspect kept, multiples of 16 (floor); short side at least 512, then long up to 1536."""
    short, long = sorted(content_size)
    if long * SIDE_MIN > short * SIDE_MAX:
        raise InputError(
            f"`content_image` is {content_size[0]}x{content_size[1]}, too thin to give the picture its shape "
            f"(the limit is {SIDE_MAX // SIDE_MIN}:1): crop it, or give width and height with keep_size off.",
            field="content_image",
        )
    long_side = AUTO_LONG_SIDE
    short_side = AUTO_LONG_SIDE * short // long // SIDE_STEP * SIDE_STEP
    if short_side < SIDE_MIN:
        short_side, long_side = SIDE_MIN, SIDE_MIN * long // short // SIDE_STEP * SIDE_STEP
    return (long_side, short_side) if content_size[0] >= content_size[1] else (short_side, long_side)


def _other_side(name: str, given_name: str, given: int, ratio: float) -> int:
    side = round(given * ratio / SIDE_STEP) * SIDE_STEP
    if not SIDE_MIN <= side <= SIDE_MAX:
        raise InputError(
            f"`{name}` would be {side} with {given_name} {given} and the content picture's shape, outside "
            f"{SIDE_MIN} to {SIDE_MAX}: give `{name}` too, or another {given_name}.",
            field=name,
        )
    return side
