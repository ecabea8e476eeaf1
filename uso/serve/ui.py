"""The page: the schema's fields as controls, over one engine.

A click on Generate only submits; a watcher, an async generator, follows the visitor's jobs and shows what
changed. So a closed or reloaded page loses nothing: jobs belong to the engine, and a key kept in the browser
finds them again. Imports no torch.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import: no outgoing requests

import gradio as gr
import safehttpx
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uso.errors import InputError, USOError
from uso.images import MAX_BYTES, open_image
from uso.schema import SEED_MAX, GenerationRequest, bounds, parse_request
from uso.serve.cost import cost_text
from uso.serve.engine import Engine, Job, Origin
from uso.serve.files import Files, Picture
from uso.serve.intents import EXAMPLES, INTENTS, PICTURES, Intent, thumbnail
from uso.serve.words import (
    announcement,
    hint,
    info_line,
    problem,
    status_line,
    takes_guidance,
    title,
    told,
)
from uso.settings import Settings

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAX_PICTURES = 8
VISITORS_KEPT = 1000
BATCHES_KEPT = 100  # of one visitor
JOBS_SHOWN = 24  # of one visitor, in the strip below the picture
WATCH_SECONDS = 0.2  # between looks at what a visitor waits for
IDLE_SECONDS = 5.0  # the same while it is nothing
SIZES = {
    "Auto": None,
    "Square": (1024, 1024),
    "Portrait": (832, 1216),
    "Landscape": (1216, 832),
    "Custom": None,
}
EMPTY = "Drop a subject and a style, or click an example below.<br>The picture forms here."
CLIENTS = "page:"  # owner of what gradio_client asks for: no visitor's, not even one's without a key
GONE = "That picture is not on the server any more: use the downloaded file, or draw it again."

# Handlers only look at the engine and never wait for it, so none need queue behind another.
QUIET: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "trigger_mode": "multiple",
    "api_visibility": "private",
}
LATEST = QUIET | {"trigger_mode": "always_last"}  # or an older answer could come after a newer one


@dataclass
class Visitor:
    """One browser: its jobs, oldest first, those of one click together; and the picture picked to show."""

    batches: list[list[str]] = field(default_factory=list)
    picked: str | None = None

    def jobs(self, engine: Engine) -> list[Job]:
        ids = [job_id for batch in self.batches for job_id in batch]
        return [job for job_id in ids if (job := engine.get(job_id)) is not None]


@dataclass
class Tab:
    """One tab of a browser: what it shows, and how many watchers it had; the last one counts."""

    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    watchers: int = 0
    watched: bool = False


class Visitors:
    """Who has which jobs: by a random key that only the visitor's browser knows; the engine has its hash."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._tabs: OrderedDict[str, Tab] = OrderedDict()

    def get(self, key: str) -> Visitor:
        visitor = self._visitors.get(key)
        if visitor is None:
            batches = self._engine.batches(owner_of(key))[-BATCHES_KEPT:]
            visitor = self._visitors.setdefault(key, Visitor(batches))
        self._visitors.move_to_end(key)
        while len(self._visitors) > VISITORS_KEPT:
            self._visitors.popitem(last=False)
        return visitor

    def tab(self, request: gr.Request) -> Tab:
        session = str(request.session_hash)
        tab = self._tabs.setdefault(session, Tab())
        self._tabs.move_to_end(session)
        while len(self._tabs) > VISITORS_KEPT:
            self._tabs.popitem(last=False)
        return tab


def build_page(engine: Engine) -> gr.Blocks:
    """The page over `engine`. Every field of the schema is a component with the field's name as `elem_id`."""
    visitors = Visitors(engine)

    with gr.Blocks(
        title="USO: any subject in any style", fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        # Neither is secret: the key is random, the form is the visitor's own. A form with other fields is
        # another form.
        key = gr.BrowserState(storage_key="uso-visitor", secret="uso")
        fields = zlib.crc32(" ".join(GenerationRequest.model_fields).encode())
        saved = gr.BrowserState(storage_key=f"uso-form-{fields}", secret="uso")
        chosen = gr.BrowserState("", storage_key="uso-intent", secret="uso")
        with gr.Row(elem_id="top"):
            gr.HTML(title(engine.model), elem_id="title")
            queue = gr.HTML(elem_id="queue")
            gr.Button("Light / dark", elem_id="dark", size="sm", min_width=90, scale=0)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="ask", min_width=320):
                controls: dict[str, Any] = {}
                hints: dict[str, gr.HTML] = {}
                with gr.Row(elem_id="slots"):
                    for name in PICTURES:
                        with gr.Column(min_width=90, elem_classes="slot"):
                            controls[name] = _slot(name)
                            hints[name] = gr.HTML(hint(name), elem_id=f"{name}_hint")
                with gr.Row(elem_id="intents"):
                    intents = [gr.Button(intent.name, size="sm", min_width=70) for intent in INTENTS]
                controls["prompt"] = gr.Textbox(lines=2, max_lines=6, **_words("prompt"))
                with gr.Row(elem_id="go"):
                    generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=160)
                    about = gr.HTML(elem_id="about")
                message = gr.HTML(elem_id="message")
                with gr.Accordion("Size", open=False, elem_id="sizes"):
                    size = gr.Radio(list(SIZES), value="Auto", label="Shape", elem_id="size")
                    with gr.Row(visible=False) as sides:
                        for name in ("width", "height"):
                            controls[name] = gr.Slider(value=1024, **bounds(name), **_words(name))
                    controls["keep_size"] = gr.Checkbox(value=_default("keep_size"), **_words("keep_size"))
                with gr.Accordion("Details", open=False, elem_id="details"):
                    for name in ("num_steps", "guidance", "content_long_size"):
                        words = _words(name)
                        if name == "guidance" and not takes_guidance(engine.model):
                            words |= {"info": f"{engine.model} takes no guidance.", "interactive": False}
                        controls[name] = gr.Slider(value=_default(name), **bounds(name), **words)
                    with gr.Row():
                        controls["seed"] = gr.Number(
                            value=_default("seed"), precision=0, **bounds("seed"), **_words("seed")
                        )
                        random_seed = gr.Button(
                            "Random seed", elem_id="random_seed", size="sm", min_width=110, scale=0
                        )
                    count = gr.Slider(
                        1,
                        MAX_PICTURES,
                        value=1,
                        step=1,
                        label="Pictures",
                        info="How many to draw, each with its own seed.",
                        elem_id="count",
                    )
            with gr.Column(elem_id="answer", min_width=320):
                with gr.Column(elem_id="picture"):
                    result = gr.Image(
                        elem_id="result",
                        format="png",
                        type="filepath",
                        interactive=False,
                        show_label=False,
                        buttons=["fullscreen"],
                        alt_text="The picture that was made",
                    )
                    stage = gr.HTML(elem_id="stage")
                with gr.Row(elem_id="state"):
                    status = gr.HTML(elem_id="status")
                    cancel = _button("Cancel", "cancel", 70, scale=0)
                    keep = _button("Keep", "keep", 70, scale=0)
                    retry = gr.Button(
                        "Try again", elem_id="retry", size="sm", min_width=90, scale=0, visible=False
                    )
                with gr.Row(elem_id="facts"):
                    info = gr.HTML(elem_id="info")
                    said = gr.HTML(elem_id="said")
                with gr.Row(elem_id="uses"):
                    download = gr.DownloadButton(
                        "Download PNG", elem_id="download", size="sm", min_width=110, interactive=False
                    )
                    as_subject = _button("Use as subject", "as_subject", 110)
                    as_style = _button("Use as style", "as_style", 110)
                    same_seed = _button("Same seed", "same_seed", 90)
                    copy = _button("Copy", "copy", 60)
                with gr.Row(elem_id="last"):
                    strip = gr.Gallery(
                        elem_id="strip",
                        format="png",
                        interactive=False,
                        allow_preview=False,
                        show_label=False,
                        columns=JOBS_SHOWN,
                        height=64,
                        object_fit="cover",
                        buttons=[],
                        visible=False,
                    )
        examples = gr.Gallery(
            [(thumbnail(intent), intent.name) for intent in INTENTS],
            label="Examples: click one, then Generate",
            elem_id="examples",
            format="png",
            interactive=False,
            allow_preview=False,
            columns=len(INTENTS),
            height=150,
            object_fit="contain",
            buttons=[],
        )
        announce = gr.HTML(elem_id="announce")

        ordered = [controls[name] for name in GenerationRequest.model_fields]
        shown = {
            "stage": stage,
            "result": result,
            "status": status,
            "info": info,
            "cancel": cancel,
            "keep": keep,
            "retry": retry,
            "queue": queue,
            "strip": strip,
            "download": download,
            "as_subject": as_subject,
            "as_style": as_style,
            "same_seed": same_seed,
            "copy": copy,
            "announce": announce,
        }

        def submit(visitor_key: str, shape: str, pictures: float, *values: Any) -> list[Any]:
            """Queue the pictures; returns the slots' hints, the message beside the button, and what the last
            picture's buttons said: nothing any more."""
            answers = {name: hint(name) for name in PICTURES} | {"": ""}
            visitor = visitors.get(visitor_key)
            jobs: list[str] = []
            try:
                if not visitor_key:
                    raise InputError("The page is not ready yet: try again in a moment.")
                if pictures not in range(1, MAX_PICTURES + 1):
                    raise InputError(f"Pictures must be a whole number from 1 to {MAX_PICTURES}.")
                form = dict(zip(GenerationRequest.model_fields, values, strict=True))
                owner = owner_of(visitor_key)
                request, given = read_form(form, auto_size=shape == "Auto")
                opened = keep_pictures(given, files=engine.files, owner=owner)
                origin = Origin(owner, batch=secrets.token_urlsafe(6))
                for number in range(int(pictures)):
                    seed = request.seed if request.seed < 0 else (request.seed + number) % (SEED_MAX + 1)
                    one = request.model_copy(update={"seed": seed})
                    jobs.append(engine.submit(one, opened, origin).id)
            except USOError as error:
                at = error.field if isinstance(error, InputError) and error.field in answers else ""
                answers[at] = problem(str(error))
                if at:
                    slot = GenerationRequest.model_fields[at].title
                    answers[""] = problem(f"Not drawn: see below {slot}.")
            if jobs:
                visitor.batches = [*visitor.batches, jobs][-BATCHES_KEPT:]
                visitor.picked = None
            return [*answers.values(), ""]

        async def follow(tab: Tab, visitor_key: str) -> AsyncGenerator[list[Any], None]:
            """What the tab does not show yet; ends when all is shown, or another watcher begins there."""
            turn = tab.watchers = tab.watchers + 1
            tab.watched, heard, settled = True, 0.0, False
            try:
                while tab.watchers == turn and not settled:
                    visitor = visitors.get(visitor_key)
                    # Asked before looking: what ends in between is seen in the next round.
                    jobs = visitor.jobs(engine)
                    settled = engine.status.state != "loading" and all(job.done for job in jobs)
                    view = look(engine, visitor)
                    # Something once a second, so that a tab that is gone is noticed.
                    if view != tab.shown or time.monotonic() - heard >= 1:
                        before, tab.shown, heard = tab.shown, view, time.monotonic()
                        yield [
                            gr.skip() if before.get(name) == view[name] else gr.update(**view[name])
                            for name in shown
                        ]
                    if not settled:
                        await asyncio.sleep(WATCH_SECONDS)
            finally:
                if tab.watchers == turn:
                    tab.watched = False
                    if not settled:  # who knows what arrived
                        tab.shown = {}

        async def watch(visitor_key: str, request: gr.Request) -> AsyncIterator[list[Any]]:
            tab = visitors.tab(request)
            tab.shown = {}
            async with aclosing(follow(tab, visitor_key)) as updates:
                async for update in updates:
                    yield update

        async def idle(visitor_key: str, request: gr.Request) -> AsyncIterator[list[Any]]:
            """Watch again when there is something to see: the queue, and what other tabs asked for."""
            tab = visitors.tab(request)
            if not visitor_key or tab.watched or tab.shown == look(engine, visitors.get(visitor_key)):
                yield [gr.skip()] * len(shown)
                return
            async with aclosing(follow(tab, visitor_key)) as updates:
                async for update in updates:
                    yield update

        def stop(visitor_key: str) -> None:
            """Cancel what was asked for in one click: the batch that is being drawn, or waits."""
            for batch in visitors.get(visitor_key).batches:
                if [job_id for job_id in batch if engine.cancel(job_id)]:
                    return

        def keep_picture(visitor_key: str) -> None:
            for job in visitors.get(visitor_key).jobs(engine):
                engine.keep(job.id)

        def pick(visitor_key: str, event: gr.SelectData) -> None:
            visitor = visitors.get(visitor_key)
            done = pictures_of(visitor.jobs(engine))
            visitor.picked = done[event.index].id if event.index < len(done) else None

        def use(visitor_key: str, name: str) -> list[Any]:
            job = shown_job(visitors.get(visitor_key), engine)
            if job is None or job.result is None:
                return [gr.skip(), problem(GONE)]
            slot = GenerationRequest.model_fields[name].title
            return [str(job.result.path), told(f"It is in the slot {slot} now.")]

        def seed_of(visitor_key: str) -> list[Any]:
            job = shown_job(visitors.get(visitor_key), engine)
            if job is None:
                return [gr.skip(), problem(GONE)]
            return [job.work.seed, told(f"Seed {job.work.seed} is set in Details.")]

        def advise(shape: str, pictures: float, use: str, *values: Any) -> str:
            """What stands beside Generate: how long it takes, or what is missing."""
            form = dict(zip(GenerationRequest.model_fields, values, strict=True))
            form["prompt"] = (form["prompt"] or "").strip()
            for intent in INTENTS:
                if intent.name == use and (lacks := intent.lacks(form)):
                    return lacks
            if form["keep_size"] and not form["content_image"]:
                return "Keep the subject's shape: needs a subject."
            if not any(form[name] for name in ("prompt", *PICTURES)):
                return "Drop a picture or write a prompt."
            try:
                request, given = read_form(form, auto_size=shape == "Auto")
                cost = engine.cost(request, {name: picture_size(path) for name, path in given.items()})
            except InputError:  # a field is empty just now, or a picture is told to be none
                cost = None
            return cost_text([cost] * round(pictures)) if cost else ""

        def intend(intent: Intent) -> list[Any]:
            values = [intent.sets.get(name, gr.skip()) for name in GenerationRequest.model_fields]
            return [*values, intent.name, told(f"{intent.name}: {intent.told}")]

        def show_example(event: gr.SelectData) -> list[Any]:
            intent = INTENTS[event.index]
            pictures = {
                name: str(EXAMPLES / intent.example[name]) for name in PICTURES if name in intent.example
            }
            empty = dict.fromkeys(PICTURES) | {"prompt": "", "keep_size": False}
            values = empty | intent.sets | {"prompt": intent.example.get("prompt", "")} | pictures
            return [
                *(values.get(name, gr.skip()) for name in GenerationRequest.model_fields),
                intent.name,
                told(f"{intent.name}: press Generate."),
            ]

        async def generate_api(
            prompt: str,
            content_image: Any = None,
            style_image: Any = None,
            extra_style_image: Any = None,
            width: Any = None,
            height: Any = None,
            num_steps: Any = None,
            guidance: Any = None,
            seed: Any = None,
            keep_size: Any = None,
            content_long_size: Any = None,
            progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio's way to ask for it
        ) -> tuple[str, dict[str, Any]]:
            """Draw one picture; returns the PNG and its parameters as executed."""
            form = {name: value for name, value in locals().items() if name in GenerationRequest.model_fields}
            try:
                asked, given = read_form(form, auto_size=False)
                pictures = await asyncio.to_thread(keep_pictures, given, files=engine.files, owner=CLIENTS)
                job = await asyncio.to_thread(engine.submit, asked, pictures, Origin(CLIENTS))
            except USOError as error:
                raise gr.Error(str(error), print_exception=False) from error
            try:
                async for job in engine.watch(job.id):  # noqa: B020  the same job, later
                    progress((job.step, job.work.num_steps), desc=job.phase)
            finally:
                engine.cancel(job.id)  # the client went away; nothing happens to a job that has ended
            if job.result is None:
                raise gr.Error(job.error or "The job was cancelled.", print_exception=False)
            return str(job.result.path), job.result.parameters

        watching: dict[str, Any] = {"fn": watch, "inputs": key, "outputs": [*shown.values()], **QUIET}
        form = [size, count, *ordered]
        advising: dict[str, Any] = {
            "fn": advise,
            "inputs": [size, count, chosen, *ordered],
            "outputs": about,
            "preprocess": False,
            **LATEST,
        }
        defaults = json.dumps([control.value for control in form])
        page.load(None, saved, form, js=f"(saved) => saved ?? {defaults}")
        page.load(lambda known: known or secrets.token_urlsafe(18), key, key, **QUIET).then(**watching)
        gr.on([control.change for control in form], None, form, saved, js="(...form) => [form]")
        gr.on([page.load, *(control.change for control in [*form, chosen])], **advising)
        for button, intent in zip(intents, INTENTS, strict=True):
            button.click(lambda intent=intent: intend(intent), None, [*ordered, chosen, message], **QUIET)
        examples.select(show_example, None, [*ordered, chosen, message], **QUIET)
        random_seed.click(lambda: -1, None, controls["seed"], **QUIET)
        gr.on(
            [generate.click, controls["prompt"].submit],
            submit,
            [key, *form],
            [*hints.values(), message, said],
            preprocess=False,
            **QUIET,
        ).then(**watching).then(**advising)
        retry.click(engine.start, **QUIET).then(**watching)
        cancel.click(stop, key, **QUIET)
        keep.click(keep_picture, key, **QUIET)
        strip.select(pick, key, **QUIET).then(**watching)
        for button, name in ((as_subject, "content_image"), (as_style, "style_image")):
            button.click(lambda key, name=name: use(key, name), key, [controls[name], said], **QUIET)
        same_seed.click(seed_of, key, [controls["seed"], said], **QUIET)
        copy.click(None, None, said, js="() => copyPicture()")  # in page.html
        gr.Timer(IDLE_SECONDS).tick(**watching | {"fn": idle})
        # In the browser: a Generate that follows at once asks for this size already.
        both = [controls["width"], controls["height"]]
        size.input(
            None, [size, *both], both, js=f"(shape, ...sides) => ({json.dumps(SIZES)})[shape] ?? sides"
        )
        size.change(None, size, sides, js="(s) => ({__type__: 'update', visible: s !== 'Auto'})")
        # For gradio_client, which takes types and defaults from the components (None: from the function). On
        # the page a size is always there; here it may be left out.
        optional = {name: gr.Number(label=name, precision=0, visible=False) for name in ("width", "height")}
        picture = gr.Image(label="picture", format="png", visible=False)
        parameters = gr.JSON(label="parameters", visible=False)
        gr.Button(visible=False).click(
            generate_api,
            [optional.get(name, controls[name]) for name in GenerationRequest.model_fields],
            [picture, parameters],
            api_name="generate",
            preprocess=False,
            concurrency_limit=None,
            trigger_mode="multiple",
        )
        for name in PICTURES:
            # The file as it was uploaded: Gradio's own conversion would fail first, with a worse sentence.
            controls[name].change(
                lambda picture, name=name: check_picture(name, picture),
                controls[name],
                hints[name],
                preprocess=False,
                **LATEST,
            )
    return page


def owner_of(visitor_key: str) -> str:
    """Under which name a visitor's jobs and files are stored; the key itself is not."""
    return f"page:{hashlib.sha256(visitor_key.encode()).hexdigest()}"


def read_form(form: dict[str, Any], *, auto_size: bool) -> tuple[GenerationRequest, dict[str, Path]]:
    """The request and its pictures' files; InputError says what is wrong, and where."""
    given = {name: uploaded(name, form[name]) for name in PICTURES if form[name]}
    data = form | {name: {"path": str(given[name])} if name in given else None for name in PICTURES}
    if auto_size:
        data |= {"width": None, "height": None}
    return parse_request(data), given


def keep_pictures(given: dict[str, Path], *, files: Files, owner: str) -> dict[str, Picture]:
    """The pictures, stored; InputError says which is none."""
    return {
        name: files.keep_picture(path.read_bytes(), field=name, owner=owner, filename=path.name)
        for name, path in given.items()
    }


@lru_cache(maxsize=256)
def picture_size(path: Path) -> tuple[int, int]:
    """(width, height), upright. A file is looked at once: Gradio names it after its content."""
    return open_image(path).size


def uploaded(name: str, picture: dict[str, Any]) -> Path:
    """The file of a slot. Gradio lets any path through that comes without its mark, so it is checked here."""
    path = Path(picture.get("path") or "").resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise InputError(f"`{name}` is not on the server any more: give the picture again.", field=name)
    return path


def check_picture(name: str, picture: dict[str, Any] | None) -> str:
    """What stands below a slot: its help, or what is wrong with the file in it."""
    try:
        if picture is not None:
            open_image(uploaded(name, picture), field=name)
    except InputError as error:
        return problem(str(error))
    return hint(name)


def pictures_of(jobs: list[Job]) -> list[Job]:
    """Finished pictures, the newest first."""
    return [job for job in reversed(jobs) if job.result]


def shown_job(visitor: Visitor, engine: Engine) -> Job | None:
    """The job whose picture is shown: the picked one, else the newest."""
    done = pictures_of(visitor.jobs(engine))
    return next((job for job in done if job.id == visitor.picked), done[0] if done else None)


def look(engine: Engine, visitor: Visitor) -> dict[str, dict[str, Any]]:
    """What the visitor should see now: the properties of each shown component."""
    jobs = visitor.jobs(engine)
    live = [job for job in jobs if not job.done]
    current = live[0] if live else None
    drawing = current is not None and current.state == "running" and current.phase != "decoding"
    shown, done = shown_job(visitor, engine), pictures_of(jobs)
    path = str(shown.result.path) if shown and shown.result else None
    stage = (
        f'<img src="{current.preview}" alt="The picture as it forms">' if current and current.preview else ""
    )
    if not stage and path is None:
        stage = f'<p class="empty">{EMPTY}</p>'
    return {
        "stage": {"value": stage},
        "result": {"value": path},
        "status": {"value": status_line(engine, jobs)},
        "info": {"value": info_line(shown)},
        "cancel": {"interactive": current is not None and current.stop != "cancel"},
        "keep": {"interactive": drawing and current is not None and current.stop is None},
        "retry": {"visible": engine.status.state == "failed"},
        "queue": {"value": f"Queue {engine.waiting}"},
        "strip": {
            "value": [str(job.result.path) for job in done[:JOBS_SHOWN] if job.result],
            "visible": bool(done),
        },
        "download": {"value": path, "interactive": path is not None},
        "as_subject": {"interactive": path is not None},
        "as_style": {"interactive": path is not None},
        "same_seed": {"interactive": path is not None},
        "copy": {"interactive": path is not None},
        "announce": {"value": announcement(engine, jobs)},
    }


def _words(name: str) -> dict[str, Any]:
    """Label, help and id of a field's control."""
    field = GenerationRequest.model_fields[name]
    return {"label": field.title, "info": field.description, "elem_id": name}


def _default(name: str) -> Any:
    return GenerationRequest.model_fields[name].default


def _button(text: str, elem_id: str, min_width: int, **layout: Any) -> gr.Button:
    """A small button that can be clicked once there is something to do."""
    return gr.Button(text, elem_id=elem_id, size="sm", min_width=min_width, interactive=False, **layout)


def _slot(name: str) -> gr.Image:
    return gr.Image(
        label=GenerationRequest.model_fields[name].title,
        elem_id=name,
        format="png",
        type="filepath",
        image_mode=None,
        placeholder="Drop, paste or click",
        sources=["upload", "clipboard", "webcam"],
        buttons=[],
        height=150,
    )


def theme() -> gr.themes.Base:
    """One accent colour, the system's own fonts: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size="md",
        spacing_size="md",
    ).set(  # contrast of at least 4.5
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700",
        slider_color="*primary_600",
    )


class NoSniff:
    """Files of strangers are shown as what they are served as, never as what a browser guesses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, send_with_header)


NOT_OURS = (
    "This server answers as localhost, not as {}. A proxy in front of it is to send the host on as localhost "
    "and the outer name as X-Forwarded-Host. To be reached without: --host 0.0.0.0 and --auth USER:PASSWORD."
)


class OwnNames:
    """Answers under names of this machine alone, against DNS rebinding: a page elsewhere may give us its own.

    Args:
        host: the address listened on.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.names = {"localhost", "127.0.0.1", host.strip("[]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] in ("http", "websocket"):
            name = Headers(scope=scope).get("host")
            if not self._is_own(name):
                app = PlainTextResponse(NOT_OURS.format(name), status_code=400)
        await app(scope, receive, send)

    def _is_own(self, header: str | None) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return name in self.names or name.endswith(".gradio.live")


def check_exposure(settings: Settings) -> None:
    """Raise InputError when strangers could use the machine without a password and nobody insisted."""
    if is_exposed(settings) and not (settings.auth or settings.no_password or settings.space_id):
        what = "A public link" if settings.share else f"Listening on {settings.host}"
        raise InputError(
            f"{what} lets others use this machine: set a password with --auth USER:PASSWORD, or insist with "
            "--no-password."
        )


def is_exposed(settings: Settings) -> bool:
    """Whether others than this machine can reach the server."""
    return settings.share or not _is_loopback(settings.host)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def close_urls() -> None:
    """Gradio reads URLs in place of files, under rules weaker than those of `uso.serve.fetch`: not here."""

    async def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("The page reads no URLs: upload the file.")

    safehttpx.get = safehttpx.async_validate_url = refuse


def launch(
    engine: Engine,
    settings: Settings,
    *,
    routes: Sequence[BaseRoute] = (),
    front: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> gr.Blocks:
    """Serve the page in the background, and `routes` before it; returns it once it answers.

    `front` is put around all, outside of what Gradio itself puts around.
    """
    close_urls()
    page = build_page(engine)
    page.queue(api_open=False)
    middleware = [Middleware(NoSniff)]
    if _is_loopback(settings.host) and not settings.space_id:
        middleware.insert(0, Middleware(OwnNames, host=settings.host))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = front(app.middleware_stack)
        yield

    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        share=settings.share,
        auth=tuple(settings.auth.get_secret_value().split(":", 1)) if settings.auth else None,  # type: ignore[arg-type]
        app_kwargs={
            "routes": [*routes],
            "middleware": middleware,
            "lifespan": lifespan,
        },
        prevent_thread_lock=True,
        theme=theme(),
        css_paths=[HERE / "page.css"],
        head_paths=[HERE / "page.html"],
        footer_links=["api"],
        allowed_paths=[str(EXAMPLES), str(engine.files.folder)],
        show_error=True,
        max_file_size=MAX_BYTES,
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        quiet=True,
        _frontend=False,  # or a machine that takes three seconds to answer is not served at all
    )
    if settings.share and not page.share_url:
        logger.warning("No public link could be made, is there an internet connection? Serving without it.")
    return page
