"""The page is the schema's: same fields, bounds, defaults and words; and what it says is true."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.test_engine import FakePipeline
from uso.errors import InputError
from uso.schema import GenerationRequest, bounds, parse_request
from uso.serve import intents, ui, words
from uso.serve.engine import Engine, Job, Result, Status
from uso.serve.files import Files, StoredFile
from uso.settings import Settings


@pytest.fixture
def engine() -> Engine:
    engine = Engine(lambda progress: FakePipeline(), model="fake")
    engine._status = Status("ready", "Ready")
    return engine


def test_the_controls_are_the_fields_of_the_schema(engine: Engine) -> None:
    components = ui.build_page(engine).get_config_file()["components"]
    fields = GenerationRequest.model_fields
    controls = {c["props"]["elem_id"]: c["props"] for c in components if c["props"].get("elem_id") in fields}
    assert set(controls) == set(fields)
    numeric = [
        name
        for name, spec in GenerationRequest.model_json_schema()["properties"].items()
        if "minimum" in spec
    ]
    for name, props in controls.items():
        assert props["label"] == fields[name].title
        if not name.endswith("_image"):
            assert props["info"] == fields[name].description
        if name in numeric:
            assert {key: props[key] for key in ("minimum", "maximum", "step")} == bounds(name)
        if fields[name].default is not None and not fields[name].is_required():
            assert props["value"] == fields[name].default


@pytest.fixture(autouse=True)
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's folder is where Gradio keeps uploads."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


def test_only_uploaded_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private.png"
    Image.new("RGB", (64, 48)).save(path)
    assert "problem" not in ui.check_picture("content_image", {"path": str(path)})
    (tmp_path / "uploads").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    told = ui.check_picture("content_image", {"path": str(tmp_path / "uploads" / ".." / "private.png")})
    assert "Subject is not on the server any more" in told


def test_the_form_is_read_as_the_schema_says(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "subject.png"
    Image.new("RGB", (64, 48), "red").save(path)
    form = {name: field.default for name, field in GenerationRequest.model_fields.items()}
    form |= {"prompt": "a fox", "content_image": {"path": str(path)}, "width": 1024, "height": 512}
    request, given = ui.read_form(form, auto_size=True)
    assert (request.width, request.height) == (None, None)
    assert given == {"content_image": path}
    subject = ui.keep_pictures(given, files=engine.files, owner="page:me")["content_image"]
    assert (subject.width, subject.height) == ui.picture_size(path) == (64, 48)
    assert engine.files.path(subject.file.id).read_bytes() == path.read_bytes()
    request, _ = ui.read_form(form, auto_size=False)
    assert (request.width, request.height) == (1024, 512)
    with pytest.raises(InputError, match="`guidance` must be"):
        ui.read_form(form | {"guidance": 9}, auto_size=True)


def test_a_wrong_file_is_told_below_its_slot(tmp_path: Path) -> None:
    path = tmp_path / "subject.png"
    path.write_text("<svg onload='alert(1)'>")
    told = ui.check_picture("style_image", {"path": str(path)})
    assert "role='alert'" in told
    assert "not a PNG, JPEG, WEBP or HEIC" in told
    assert "colours, strokes" in ui.check_picture("style_image", None)


def job(engine: Engine, **changes: Any) -> Job:
    made = engine.submit(parse_request({"prompt": "", "seed": 7}), {})
    made = dataclasses.replace(made, **changes)
    engine._jobs[made.id] = made
    return made


def test_the_status_line_is_always_true(engine: Engine) -> None:
    assert "Ready" in words.status_line(engine, [])
    running = job(engine, state="running", phase="drawing", step=7, seconds_left=3.04)
    assert "Step 7 of 25 · 3.0 s left" in words.status_line(engine, [running])
    engine._queue.clear()
    waiting = job(engine)
    assert "Queued: 1 before yours" in words.status_line(engine, [waiting])
    failed = job(engine, state="failed", error="<b>No</b> memory.")
    assert "&lt;b&gt;No&lt;/b&gt; memory." in words.status_line(engine, [failed])
    seconds: dict[Any, float] = {"encoding": 1.0, "drawing": 2.0, "decoding": 1.1}
    used = {"seed": 7, "width": 1024, "height": 672, "num_steps": 25}
    result = Result(Path("x.png"), used, seconds, "full", StoredFile("x.png", "", "", "", 0, ""))
    done = job(engine, state="completed", result=result, notes=("keep_size has no effect.",))
    assert "Done in 4.1 s. Keep the subject&#x27;s shape has no effect." in words.status_line(
        engine, [failed, done]
    )
    assert words.info_line(done) == "Seed <b>7</b> · 1024x672 · 25 steps"
    used |= {"quantize": "int8", "turbo": True, "stopped_at_step": 9}
    assert words.info_line(done) == "Seed <b>7</b> · 1024x672 · 9 steps · int8 · turbo"
    engine._status = Status("loading", "Loading vae", 0.5)
    assert "Loading vae" in words.status_line(engine, [waiting])


def test_a_closed_tab_ends_its_watcher_and_not_its_job(engine: Engine) -> None:
    handlers = {fn.name: fn.fn for fn in ui.build_page(engine).fns.values()}
    form = [field.default for field in GenerationRequest.model_fields.values()]
    handlers["submit"]("visitor", "Auto", 2, "a fox", *form[1:])

    async def open_and_close_a_tab() -> None:
        tab = handlers["watch"]("visitor", SimpleNamespace(session_hash="tab"))
        assert "Queued: next" in str(await anext(tab))
        await tab.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(tab)

    asyncio.run(open_and_close_a_tab())
    assert engine.waiting == 2
    assert not any(job.done for job in engine._jobs.values())


def test_a_visitor_finds_the_own_jobs_after_a_restart(engine: Engine) -> None:
    handlers = {fn.name: fn.fn for fn in ui.build_page(engine).fns.values()}
    form = [field.default for field in GenerationRequest.model_fields.values()]
    for pictures in (2, 1):
        handlers["submit"]("visitor", "Auto", pictures, "a fox", *form[1:])
    restarted = Engine(lambda progress: FakePipeline(), model="fake", files=Files(engine.files.store))
    visitor = ui.Visitors(restarted).get("visitor")
    assert [len(batch) for batch in visitor.batches] == [2, 1]
    assert [job.state for job in visitor.jobs(restarted)] == ["queued"] * 3
    assert ui.Visitors(restarted).get("another").batches == []


@pytest.mark.parametrize("key", ["", "visitor"])
def test_no_visitor_sees_what_api_clients_asked_for(engine: Engine, key: str) -> None:
    (generate,) = [f for f in ui.build_page(engine).fns.values() if f.api_name == "generate"]
    form = [field.default for field in GenerationRequest.model_fields.values()]
    with pytest.raises(TimeoutError):  # the engine was not started: the job waits
        asyncio.run(asyncio.wait_for(generate.fn("a fox", *form[1:]), 0.5))
    assert engine.batches(ui.CLIENTS)
    assert ui.Visitors(engine).get(key).batches == []


def test_a_tab_that_waits_for_nothing_sees_what_changes(engine: Engine) -> None:
    """The queue, a lost device, and what another tab of the same browser asks for; and nothing twice."""
    handlers = {fn.name: fn.fn for fn in ui.build_page(engine).fns.values()}
    form = [field.default for field in GenerationRequest.model_fields.values()]
    tab = SimpleNamespace(session_hash="tab")

    async def look(name: str) -> str:
        return str([update async for update in handlers[name]("visitor", tab)])

    async def look_on() -> None:
        assert "Queue 0" in await look("watch")
        assert "Queue" not in await look("idle")
        job(engine)
        assert "Queue 1" in (seen := await look("idle"))
        assert "Ready" not in seen, "has not changed"
        handlers["submit"]("visitor", "Auto", 1, "a fox", *form[1:])
        following = handlers["idle"]("visitor", tab)
        assert "Queued: 1 before yours" in str(await anext(following))
        assert "Queue" not in await look("idle"), "it is followed already"
        await following.aclose()
        following = handlers["idle"]("visitor", tab)
        assert "Queue 2" in str(await anext(following)), "who knows what arrived"
        await following.aclose()
        engine._status = Status("broken", "Restart the server.")
        for waiting in [*engine._queue]:
            engine.cancel(waiting)
        assert "Restart the server." in await look("idle")

    asyncio.run(look_on())


def test_what_cannot_work_is_said_beside_the_button(engine: Engine) -> None:
    handlers = {fn.name: fn.fn for fn in ui.build_page(engine).fns.values()}
    form = {name: field.default for name, field in GenerationRequest.model_fields.items()} | {"prompt": None}
    picture = {"path": "x"}
    given: dict[str, Any]
    for use, given, told in (
        ("", {}, "Drop a picture or write a prompt."),
        ("", {"prompt": "a fox", "keep_size": True}, "Keep the subject's shape: needs a subject."),
        ("Restyle", {}, "Restyle needs a subject and a style."),
        ("Restyle", {"style_image": picture}, "Restyle needs a subject."),
        ("New scene", {"content_image": picture, "prompt": " "}, "New scene needs a prompt."),
        ("Style only", {}, "Style only needs a style and a prompt."),
        ("Mix styles", {"style_image": picture, "prompt": "a fox"}, "Mix styles needs a second style."),
        ("Mix styles", {}, "Mix styles needs a style, a second style and a subject or a prompt."),
    ):
        assert handlers["advise"]("Auto", 1, use, *(form | given).values()) == told
    told = handlers["advise"]("Auto", 1, "Text", *(form | {"prompt": "a fox"}).values())
    assert "needs" not in told


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, None),
        ({"host": "::1"}, None),
        ({"host": "0.0.0.0"}, "Listening on 0.0.0.0"),
        ({"host": "my-machine"}, "Listening on my-machine"),
        ({"share": True}, "A public link"),
        ({"share": True, "auth": "me:secret"}, None),
        ({"host": "0.0.0.0", "no_password": True}, None),
        ({"host": "0.0.0.0", "space_id": "me/uso"}, None),
    ],
)
def test_strangers_need_a_password(settings: dict[str, Any], refused: str | None) -> None:
    if refused is None:
        ui.check_exposure(Settings(**settings))
    else:
        with pytest.raises(InputError, match=refused):
            ui.check_exposure(Settings(**settings))


@pytest.mark.parametrize(("model", "works"), [("flux-schnell", False), ("flux-dev", True), ("nano", True)])
def test_a_control_without_effect_says_so(engine: Engine, model: str, works: bool) -> None:
    engine.model = model
    (guidance,) = (c for c in ui.build_page(engine).blocks.values() if c.elem_id == "guidance")
    assert (guidance.interactive is not False) is works
    assert ("takes no guidance" not in guidance.info) is works


def test_an_intent_sets_what_it_says_and_has_an_example() -> None:
    for intent in intents.INTENTS:
        assert set(intent.sets) | set(intent.example) <= set(GenerationRequest.model_fields)
        assert intents.thumbnail(intent).width >= 160
    assert [intent.name for intent in intents.INTENTS] == [
        "Restyle",
        "New scene",
        "Style only",
        "Mix styles",
        "Text",
    ]


def test_the_page_imports_no_torch() -> None:
    """Nor does anything it needs before it answers."""
    check = "import sys, uso.serve.ui; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=120).returncode == 0


def test_nothing_on_the_page_points_elsewhere(engine: Engine) -> None:
    page = ui.build_page(engine)
    text = json.dumps(page.get_config_file(), default=str) + ui.theme()._get_theme_css()
    text += "".join((Path(ui.__file__).parent / name).read_text() for name in ("page.css", "page.html"))
    assert "googleapis" not in text
    assert 'src="http' not in text
