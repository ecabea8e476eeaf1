"""The page is the schema's: same fields, bounds, defaults and words; and what it says is true."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.test_engine import FakePipeline
from uso.errors import InputError
from uso.schema import GenerationRequest, bounds, parse_request
from uso.serve import intents, ui, words
from uso.serve.engine import Engine, Job, Result, Status
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


def test_the_form_is_read_as_the_schema_says(tmp_path: Path) -> None:
    path = tmp_path / "subject.png"
    Image.new("RGB", (64, 48), "red").save(path)
    form = {name: field.default for name, field in GenerationRequest.model_fields.items()}
    form |= {"prompt": "a fox", "content_image": {"path": str(path)}, "width": 1024, "height": 512}
    request, pictures, hashes = ui.read_form(form, auto_size=True)
    assert (request.width, request.height) == (None, None)
    assert pictures["content_image"].size == (64, 48)
    assert list(hashes) == ["content_image"]
    request, _, _ = ui.read_form(form, auto_size=False)
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
    made = engine.submit(parse_request({"prompt": "", "seed": 7}), {}, {})
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
    result = Result(Path("x.png"), {}, {"encoding": 1.0, "drawing": 2.0, "decoding": 1.1}, "full")
    done = job(engine, state="completed", result=result, notes=("keep_size has no effect.",))
    assert "Done in 4.1 s. keep_size has no effect." in words.status_line(engine, [failed, done])
    engine._status = Status("loading", "Loading vae", 0.5)
    assert "Loading vae" in words.status_line(engine, [waiting])


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
