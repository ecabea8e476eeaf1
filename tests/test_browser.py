"""The page in headless Chromium, on the nano model."""

import contextlib
import io
import os
import re
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from uso.images import MAX_BYTES
from uso.metadata import read_parameters
from uso.schema import GenerationRequest

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]
ROOT = Path(__file__).parent.parent
SUBJECT, STYLE = (ROOT / "assets" / "examples" / name for name in ("fox.jpg", "pop-art.jpg"))
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 120_000  # milliseconds; the machine may be busy


@contextlib.contextmanager
def serving(folder: Path, **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of the app, slow while `folder / "slow"` exists; it answers before it is loaded."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "GRADIO_TEMP_DIR": str(folder),
        "USO_DATA_DIR": str(folder / "data"),
        "USO_MODEL": "nano",
        "USO_PORT": str(port),
        **environment,
    }
    command = [sys.executable, "-m", "tests.paced_app", str(folder / "slow")]
    process = subprocess.Popen(command, cwd=folder, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server holds."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Address of the app with nano."""
    with serving(folder) as (url, process):
        yield url
        # stopped in the middle of a job, which ends first
        (folder / "slow").touch()
        data = ["", None, None, None, 1536, 1536, 50, 4, -1, False, 512]
        httpx.post(f"{url}/gradio_api/call/generate", json={"data": data}).raise_for_status()
        with contextlib.closing(sqlite3.connect(folder / "data" / "uso.db")) as db:
            newest = "SELECT state FROM tasks ORDER BY number DESC"
            while db.execute(newest).fetchone() != ("running",):
                time.sleep(0.1)
            process.terminate()
            (folder / "slow").unlink()
            assert process.wait(timeout=60) == 0
            assert db.execute(newest).fetchone() == ("completed",)


@pytest.fixture
def slow(server: str, folder: Path) -> Iterator[Path]:
    """A step takes a second as long as this file is there; loading, which would wait, is done."""
    while httpx.get(f"{server}/readyz").status_code != 200:
        time.sleep(0.1)
    path = folder / "slow"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(server: str, chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page as a new visitor sees it; no request of any may leave the server."""
    contexts: list[BrowserContext] = []
    asked: list[str] = []

    def open_page(width: int = 1440, height: int = 900, color_scheme: Any = "light") -> Page:
        size: Any = {"width": width, "height": height}
        contexts.append(chromium.new_context(viewport=size, color_scheme=color_scheme, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server)
        expect(page.locator("#status")).to_contain_text("Ready", timeout=WAIT)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((server, "data:", "blob:"))] == []


def upload(page: Page, slot: str, path: Path) -> None:
    page.set_input_files(f"#{slot} input[type=file]", path)
    expect(page.locator(f"#{slot} img")).to_be_visible(timeout=WAIT)


def set_number(page: Page, field: str, value: int) -> None:
    box = page.locator(f"#{field} input[type=number]")
    expect(box).not_to_have_value("")  # an accordion's contents are made when it opens
    # What is typed while they are being made may be lost; the slider shows what the page has noted.
    slider, deadline = page.locator(f"#{field} input[type=range]"), time.monotonic() + WAIT / 1000
    noted = slider if slider.count() else box  # the seed has none
    while True:
        box.fill(str(value))
        box.blur()
        page.wait_for_timeout(100)
        if noted.input_value() == str(value):
            return
        assert time.monotonic() < deadline


def ask_for_a_long_one(page: Page) -> None:
    """It lasts while the server is `slow`."""
    page.get_by_role("button", name="Size").click()
    page.get_by_label("Custom").check()
    for field in ("width", "height"):
        set_number(page, field, 1536)
    page.get_by_role("button", name="Details").click()
    set_number(page, "num_steps", 50)
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text(re.compile(r"Step ([1-9]\d*) of 50"), timeout=WAIT)


def says(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=WAIT)


def download(page: Page, path: Path) -> dict[str, Any]:
    """The parameters in the PNG that the page gives."""
    with page.expect_download() as downloading:
        page.click("#download")
    downloading.value.save_as(path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    return read_parameters(path)


@pytest.mark.parametrize("width", [1440, 390])
def test_the_whole_first_use(visit: Callable[..., Page], width: int, tmp_path: Path) -> None:
    """Two pictures become one; with USO_SCREENSHOTS set, that folder gets pictures of the page."""
    shots = Path(os.environ.get("USO_SCREENSHOTS", tmp_path))
    page = visit(width=width)
    page.screenshot(path=shots / f"page-{width}-empty.png")
    upload(page, "content_image", SUBJECT)
    upload(page, "style_image", STYLE)
    page.fill("#prompt textarea", "a fox")
    page.get_by_role("button", name="Details").click()
    set_number(page, "num_steps", 10)
    page.click("#generate")
    page.get_by_role("button", name="Details").click()
    says(page, "Done in")
    expect(page.locator("#about")).to_contain_text("about", timeout=WAIT)
    page.wait_for_function("[...document.querySelectorAll('#result img')].every(image => image.complete)")
    page.screenshot(path=shots / f"page-{width}.png", full_page=width < 640)
    seed = re.search(r"Seed (\d+)", page.inner_text("#info"))
    assert seed is not None
    parameters = download(page, tmp_path / "picture.png")
    assert parameters["seed"] == int(seed[1])
    assert (parameters["prompt"], parameters["num_steps"]) == ("a fox", 10)
    assert (parameters["width"], parameters["height"]) == (1024, 1024)
    assert set(parameters["image_sha256"]) == {"content_image", "style_image"}
    for button, slot in (("#as_style", "#style_image"), ("#as_subject", "#content_image")):
        page.click(button)
        expect(page.locator("#said")).to_contain_text("It is in the slot", timeout=WAIT)
        holds(page, slot, (tmp_path / "picture.png").read_bytes())
    page.click("#same_seed")
    page.get_by_role("button", name="Details").click()
    expect(page.locator("#seed input")).to_have_value(seed[1], timeout=WAIT)
    if width > 640:  # all of it in one screen
        for part in ("#generate", "#result", "#status", "#download"):
            box = page.locator(part).bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= 900
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = "labels => labels.filter(each => each.scrollWidth > each.clientWidth).map(each => each.innerText)"
    labels = page.locator("#examples .caption-label")
    assert labels.count() == 5
    assert labels.evaluate_all(cut) == []


def holds(page: Page, slot: str, picture: bytes) -> None:
    """The slot's picture becomes the given one, byte by byte."""
    deadline = time.monotonic() + WAIT / 1000
    while page.request.get(str(page.locator(f"{slot} img").get_attribute("src"))).body() != picture:
        assert time.monotonic() < deadline
        page.wait_for_timeout(200)


def test_a_picture_is_copied_and_pasted(visit: Callable[..., Page]) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#generate")
    says(page, "Done in")
    page.locator("#copy").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#said[role=status]")).to_contain_text("Copied", timeout=WAIT)
    page.locator("#style_image").get_by_label("Paste from clipboard").click()
    expect(page.locator("#style_image img")).to_be_visible(timeout=WAIT)
    page.locator("#prompt textarea").focus()
    for slot in ("content_image", "extra_style_image"):  # the first empty one, and the next
        page.keyboard.press("Control+v")
        expect(page.locator(f"#{slot} img")).to_be_visible(timeout=WAIT)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as without https
    page.click("#copy")
    expect(page.locator("#said .problem")).to_contain_text("use Download PNG", timeout=WAIT)


def test_a_file_above_the_limit_is_said_below_its_slot(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    page.set_input_files("#style_image input[type=file]", large)
    problem = page.locator("#slots .slot").nth(1).locator(".problem[role=alert]")
    expect(problem).to_contain_text("The file has 51 MB, the limit is 50 MB", timeout=WAIT)
    expect(page.locator("#style_image img")).to_have_count(0)
    upload(page, "style_image", STYLE)
    expect(problem).to_have_count(0)
    notes = tmp_path / "notes.txt"
    notes.write_text("not a picture")
    page.set_input_files("#style_image input[type=file]", notes)
    expect(problem).to_contain_text("notes.txt is not a picture", timeout=WAIT)
    expect(page.locator("#style_image img")).to_have_count(1)


def test_a_server_that_is_gone_is_told(visit: Callable[..., Page]) -> None:
    page = visit()
    page.context.set_offline(True)
    expect(page.locator("#state [role=alert]")).to_contain_text("does not answer", timeout=WAIT)
    expect(page.locator("#status")).to_be_hidden()
    page.context.set_offline(False)
    says(page, "Ready")
    expect(page.locator("#gone")).to_have_count(0, timeout=WAIT)


def test_progress_moves_and_cancel_stops_it_after_a_reload(visit: Callable[..., Page], slow: Path) -> None:
    page = visit()
    page.fill("#prompt textarea", "a fox")
    ask_for_a_long_one(page)
    first = page.inner_text("#status")
    expect(page.locator("#stage img")).to_be_visible(timeout=WAIT)
    expect(page.locator("#status")).not_to_contain_text(first, timeout=WAIT)
    page.click("#generate")  # the next one waits
    page.reload()  # the jobs are the server's: the page finds them again, and what was typed
    says(page, "of 50")
    expect(page.locator("#prompt textarea")).to_have_value("a fox", timeout=WAIT)
    for waiting in ("Queue 1", "Queue 0"):
        page.click("#cancel")  # once it can be clicked
        expect(page.locator("#queue")).to_contain_text(waiting, timeout=WAIT)
    says(page, "Cancelled")
    expect(page.locator("#cancel")).to_be_disabled()


@pytest.mark.parametrize("width", [1440, 390])
def test_the_layout_never_jumps(visit: Callable[..., Page], slow: Path, width: int) -> None:
    """From the empty page to a picture with a note: every part stays in its place."""
    page = visit(width=width)
    page.get_by_role("button", name="Restyle", exact=True).click()
    expect(page.locator("#about")).to_contain_text("Restyle needs", timeout=WAIT)

    def places() -> dict[str, Any]:
        parts = "#content_image, #generate, #picture, #state, #uses, #sizes, #details, #examples"
        place = "e => [e.id, e.offsetTop + e.offsetParent.getBoundingClientRect().top + scrollY]"
        return dict(page.evaluate(f"[...document.querySelectorAll('{parts}')].map({place})"))

    before = places()
    assert len(before) == 8
    page.click("#generate")
    expect(page.locator("#stage img")).to_be_visible(timeout=WAIT)
    assert places() == before
    slow.unlink()
    says(page, "Keep the subject's shape has no effect without a subject.")
    expect(page.locator("#strip img")).to_be_visible(timeout=WAIT)
    assert places() == before


def test_keep_gives_the_picture_that_is_there(visit: Callable[..., Page], slow: Path, tmp_path: Path) -> None:
    page = visit()
    ask_for_a_long_one(page)
    page.click("#keep")
    says(page, "of 50 steps")
    parameters = download(page, tmp_path / "kept.png")
    assert parameters["stopped_at_step"] < parameters["num_steps"] == 50


def test_two_visitors_see_their_own_jobs(visit: Callable[..., Page], slow: Path) -> None:
    first, second, idle = visit(), visit(), visit()
    expect(idle.locator("#queue")).to_contain_text("Queue 0")
    ask_for_a_long_one(first)
    second.click("#generate")
    says(second, "Queued: 1 before yours")
    for page in (second, idle):
        expect(page.locator("#queue")).to_contain_text("Queue 2", timeout=WAIT)
    says(first, "of 50")
    first.click("#cancel")
    says(first, "Cancelled")
    slow.unlink()
    says(second, "Done in")
    expect(first.locator("#info")).not_to_contain_text("Seed")


def test_two_tabs_of_a_browser_show_the_same(visit: Callable[..., Page], slow: Path) -> None:
    page = visit()
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("#status")).to_contain_text("Ready", timeout=WAIT)
    page.click("#generate")
    expect(other.locator("#status")).to_contain_text("of 25", timeout=WAIT)
    other.click("#keep")
    for tab in (page, other):
        expect(tab.locator("#status")).to_contain_text("of 25 steps", timeout=WAIT)
        expect(tab.locator("#info")).to_contain_text("Seed")


def test_several_pictures_come_one_by_one(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("button", name="Details").click()
    for field, value in (("num_steps", 4), ("count", 3), ("seed", 7)):
        set_number(page, field, value)
    page.click("#generate")
    expect(page.locator("#strip img")).to_have_count(3, timeout=WAIT)
    expect(page.locator("#info")).to_contain_text("Seed 9", timeout=WAIT)
    page.locator("#strip button").nth(2).click()
    expect(page.locator("#info")).to_contain_text("Seed 7", timeout=WAIT)


def test_an_example_is_two_clicks(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    page.locator("#examples button").first.click()
    expect(page.locator("#style_image img")).to_be_visible(timeout=WAIT)
    page.click("#generate")
    says(page, "Done in")
    parameters = download(page, tmp_path / "example.png")
    assert (parameters["keep_size"], parameters["content_long_size"], parameters["prompt"]) == (
        True,
        1024,
        "",
    )
    page.get_by_role("button", name="Text", exact=True).click()
    expect(page.locator("#message")).to_contain_text("Text: No pictures", timeout=WAIT)
    expect(page.locator("#style_image img")).to_have_count(0)
    expect(page.locator("#about")).to_have_text("Text needs a prompt.", use_inner_text=True, timeout=WAIT)
    page.reload()
    expect(page.locator("#about")).to_have_text("Text needs a prompt.", use_inner_text=True, timeout=WAIT)


def test_a_shape_is_there_at_once_and_after_a_reload(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    page.get_by_role("button", name="Details").click()
    set_number(page, "num_steps", 2)
    page.get_by_role("button", name="Size").click()
    page.get_by_label("Portrait").check()
    page.click("#generate")
    says(page, "Done in")
    expect(page.locator("#info")).to_contain_text("832x1216")
    set_number(page, "width", 1008)
    page.reload()
    says(page, "Done in")
    page.get_by_role("button", name="Size").click()
    expect(page.get_by_label("Portrait")).to_be_checked(timeout=WAIT)
    for field, value in (("width", "1008"), ("height", "1216")):
        expect(page.locator(f"#{field} input[type=number]")).to_have_value(value, timeout=WAIT)


UNSHOWN = ("text", "empty", "svg", "pdf", "html", "tiff")  # of the wrong files: no browser shows them


def wrong_files() -> dict[str, bytes]:
    def saved(image: Image.Image, kind: str) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    png = saved(Image.effect_noise((64, 64), 50), "PNG")
    huge = b"IHDR" + struct.pack(">II", 20000, 20000) + png[24:29]
    return {
        "text": b"not a picture",
        "empty": b"",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "pdf": b"%PDF-1.7\n%%EOF",
        "html": b"<!doctype html><title>x</title>",
        "tiff": saved(Image.new("RGB", (64, 64)), "TIFF"),
        "gif": saved(Image.new("P", (64, 64)), "GIF"),
        "cut": png[: len(png) // 2],
        "tiny": saved(Image.new("RGB", (8, 8)), "PNG"),
        "thin": saved(Image.new("RGB", (1000, 20)), "PNG"),
        "bomb": png[:12] + huge + struct.pack(">I", zlib.crc32(huge)) + png[33:],
    }


def test_wrong_files_get_a_sentence_and_nothing_is_lost(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    page.fill("#prompt textarea", "a fox")
    problem = page.locator("#content_image_hint .problem")
    for name, data in wrong_files().items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        page.set_input_files("#content_image input[type=file]", path)
        expect(problem, name).to_contain_text("Subject", timeout=WAIT)
        expect(page.locator("#content_image .unshown"), name).to_have_count(
            int(name in UNSHOWN), timeout=WAIT
        )
        if name != "bomb":
            page.locator("#content_image").get_by_label("Remove Image").click()
            expect(problem, name).to_have_count(0, timeout=WAIT)
    page.click("#generate")
    expect(page.locator("#message")).to_contain_text("Not drawn: see below Subject", timeout=WAIT)
    expect(problem).to_contain_text("Subject")
    assert page.input_value("#prompt textarea") == "a fox"
    says(page, "Ready")


def test_all_of_it_by_keyboard(visit: Callable[..., Page]) -> None:
    page = visit()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => !!document.activeElement?.closest(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("#prompt textarea")
    page.keyboard.type("a fox")
    page.keyboard.press("Control+Enter")
    says(page, "Done in")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    tab_to("#generate")
    tab_to("#sizes button")
    page.keyboard.press("Enter")
    expect(page.locator("#size")).to_be_visible()
    tab_to("#details button")
    with page.expect_download():
        tab_to("#download")
        page.keyboard.press("Enter")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The accessibility checker's source, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(["npm", "pack", "--silent", "axe-core@4"], cwd=folder, capture_output=True)
    if packed.returncode:
        pytest.skip("axe-core cannot be had from npm")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


@pytest.mark.parametrize(("width", "color_scheme"), [(1440, "light"), (1440, "dark"), (390, "light")])
def test_nothing_serious_stands_in_anybodys_way(
    visit: Callable[..., Page], axe: str, width: int, color_scheme: str
) -> None:
    page = visit(width=width, color_scheme=color_scheme)
    page.get_by_role("button", name="Size").click()
    page.get_by_label("Custom").check()
    page.get_by_role("button", name="Details").click()
    expect(page.locator("#width")).to_be_visible(timeout=WAIT)
    expect(page.locator("#num_steps")).to_be_visible(timeout=WAIT)
    for name in ("Subject", "Style", "Second style"):
        slot = page.get_by_role("button", name=f"{name}: Drop, paste or click", exact=True)
        expect(slot).to_be_visible(timeout=WAIT)
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = {
        flaw["id"]: flaw["nodes"][0]["html"] for flaw in found if flaw["impact"] in ("serious", "critical")
    }
    assert serious == {}


def test_a_model_that_loads_is_told_and_one_that_fails_is_tried_again(
    chromium: Browser, tmp_path: Path
) -> None:
    """A folder without one of its files, which is then put there; and strangers are asked for a password."""
    folder = tmp_path / "mine"
    shutil.copytree(ROOT / "assets" / "nano", folder)
    weights = next(folder.glob("vae/*.safetensors"))
    weights.rename(tmp_path / "elsewhere")
    (tmp_path / "slow").touch()
    environment = {"USO_MODEL": str(folder), "USO_AUTH": "me:secret"}
    with serving(tmp_path, **environment) as (url, _), chromium.new_context() as context:
        page = context.new_page()
        page.goto(url)
        for password in ("guess", "secret"):
            expect(page.locator("#status")).to_have_count(0)
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "guess":  # the answer empties the form
                expect(page.get_by_text("Incorrect Credentials")).to_be_visible(timeout=WAIT)
        expect(page.locator("#status")).to_contain_text(re.compile("Loading|Reading"), timeout=WAIT)
        expect(page.locator("#status progress")).to_be_visible()
        page.fill("#prompt textarea", "a fox")
        (tmp_path / "slow").unlink()
        says(page, "The model could not be loaded.")
        page.click("#generate")
        expect(page.locator("#message")).to_contain_text("could not be loaded", timeout=WAIT)
        (tmp_path / "elsewhere").rename(weights)
        page.click("#retry")
        says(page, "Ready")
        page.click("#generate")
        says(page, "Done in")
        expect(page.locator("#retry")).to_be_hidden()


def test_gradio_client_uses_the_schemas_names(server: str) -> None:
    client = Client(server, verbose=False)
    (endpoint,) = client.view_api(print_info=False, return_format="dict")["named_endpoints"].values()
    defaults = {p["parameter_name"]: p["parameter_default"] for p in endpoint["parameters"]}
    fields = GenerationRequest.model_fields
    assert defaults == {
        name: None if field.is_required() else field.default for name, field in fields.items()
    }
    _, parameters = client.predict(
        prompt="a fox", content_image=handle_file(SUBJECT), num_steps=3, api_name="/generate"
    )
    assert (parameters["num_steps"], parameters["width"]) == (3, 1024)
    with pytest.raises(Exception, match="`width` must be a whole number from 512 to 1536"):
        client.predict(prompt="a fox", width=513, api_name="/generate")


def test_a_file_of_the_server_is_not_read(server: str) -> None:
    """A path that was not uploaded, as a raw request could name it."""
    data = [
        "",
        {"path": str(ROOT / "tests/goldens/images/square.png")},
        None,
        None,
        None,
        None,
        1,
        4,
        -1,
        False,
        512,
    ]
    call = httpx.post(f"{server}/gradio_api/call/generate", json={"data": data})
    answer = httpx.get(f"{server}/gradio_api/call/generate/{call.json()['event_id']}", timeout=60)
    assert "event: error" in answer.text
    assert "not on the server" in answer.text


def test_only_names_of_this_machine_are_answered(server: str) -> None:
    for name in ("evil.example", "evil.example:7860", "localhost.evil.example", "[::", ""):
        refused = httpx.get(server, headers={"Host": name})
        assert refused.status_code == 400
        assert f"not as {name}. A proxy in front of it is to send" in refused.text
    for name in ("LOCALHOST:1", "127.0.0.1", "name.gradio.live"):
        assert httpx.get(server, headers={"Host": name}).status_code == 200
    assert httpx.get(server).headers["x-content-type-options"] == "nosniff"
