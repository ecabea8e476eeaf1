"""Each call of the product page with the unmodified Python client, release by release."""

import functools
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.clients.environments import OLD, run_python
from tests.server import SMALL, STYLE, SUBJECT, Receiver, Server, uri_of
from uso.metadata import read_parameters


@pytest.fixture(params=["latest", *(pytest.param(release, marks=pytest.mark.old_clients) for release in OLD)])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(release: str, server: Server) -> Callable[..., Any]:
    """Runs a script with the client of the release."""

    return functools.partial(run_python, release, server)


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """Another server on loopback that has the examples."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(STYLE.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


def numbers(release: str) -> tuple[int, int, int]:
    """Completed, failed, cancelled as a release is told when it asks for a task."""
    return (9, 10, 11) if release == "0.4.29" else (10, 11, 12)


def completed(release: str) -> int:
    """What ends a stream: 0.5.6 takes the 9 that precedes the 10, with the output, as the end."""
    return 9 if release in ("0.4.29", "0.5.6") else 10


def ended_by(release: str, words: str) -> list[str]:
    """The error of whoever waits for a task that gives no picture; 0.5.6 reads our numbers as others."""
    misread = {"Task cancelled": "Stream ended without completion"}.get(words, "task cancelled")
    return ["RuntimeError", (misread if release == "0.5.6" else words).lower()]


def download(uri: str) -> tuple[Image.Image, dict[str, Any]]:
    """The picture, without a key, and its parameters."""
    answer = httpx.get(uri).raise_for_status()
    assert answer.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    return image, read_parameters(io.BytesIO(answer.content))


def test_run_and_get_result(run: Callable[..., Any], release: str) -> None:
    task = run('say(client.run({"app": APP, "input": SMALL}))')
    assert task["status"] == completed(release)
    image, parameters = download(uri_of(task))
    assert image.size == (512, 512)
    assert parameters["prompt"] == "a small red boat"
    assert parameters["seed"] == 7
    file = task["output"]["generated_image"]
    assert file["content_type"] == "image/png"
    assert file["filename"].endswith(".png")
    assert file["size"] == len(httpx.get(uri_of(task)).content)


def test_stream_live_updates(run: Callable[..., Any], release: str) -> None:
    updates = run(
        """
        updates = []
        for update in client.run({"app": APP, "input": dict(SMALL, num_steps=50)}, stream=True):
            if update.get("progress"):
                print(f"progress: {update['progress']}%")
            if update.get("output"):
                print(f"output: {update['output']}")
            updates.append(update)
        say(updates)
        """
    )
    assert updates[-1]["status"] == completed(release)
    assert uri_of(updates[-1])
    assert [update["status"] for update in updates].count(completed(release)) == 1
    assert {f"Step {step} of 50" for step in range(1, 51)} <= set(updates[-1]["logs"])
    assert len(updates) > 1


def test_webhook(run: Callable[..., Any], receiver: Receiver) -> None:
    task = run(
        'say(client.run({"app": APP, "input": SMALL, "webhook": HOOK}, wait=False))', HOOK=receiver.url
    )
    message = receiver.wait(task["id"])
    assert list(message) == ["id", "status", "output", "error", "session_id", "created_at", "updated_at"]
    assert message["status"] == 9
    assert (message["error"], message["session_id"]) == ("", None)
    assert download(uri_of(message))[0].size == (512, 512)


def test_local_paths_are_uploaded(run: Callable[..., Any], server: Server, tmp_path: Path) -> None:
    input = {**SMALL, "content_image": str(SUBJECT), "style_image": str(STYLE)}
    task = run('say(client.run({"app": APP, "input": INPUT}))', INPUT=input)
    _, parameters = download(uri_of(task))
    assert parameters["image_sha256"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in {"content_image": SUBJECT, "style_image": STYLE}.items()
    }


def test_urls_are_passed_through(run: Callable[..., Any], pictures: str) -> None:
    """A foreign URL: the client leaves it alone and the server reads it."""
    url = f"{pictures}/{STYLE.name}"
    task = run('say(client.run({"app": APP, "input": dict(SMALL, style_image=PICTURE)}))', PICTURE=url)
    digest = hashlib.sha256(STYLE.read_bytes()).hexdigest()
    assert download(uri_of(task))[1]["image_sha256"] == {"style_image": digest}


def test_manual_upload(run: Callable[..., Any]) -> None:
    said = run(
        """
        upload = client.files.upload if hasattr(client, "files") else client.upload_file
        file = upload(PATH)
        tasks = [client.run({"app": APP, "input": dict(SMALL, style_image=image)})
                 for image in (file["uri"], {"uri": file["uri"]}, file)]
        say([file, tasks])
        """,
        PATH=str(STYLE),
    )
    file, tasks = said
    assert file["uri"].startswith("http://127.0.0.1")
    assert file["filename"] == STYLE.name
    assert httpx.get(file["uri"]).raise_for_status().content == STYLE.read_bytes()
    digest = hashlib.sha256(STYLE.read_bytes()).hexdigest()
    for task in tasks:
        assert download(uri_of(task))[1]["image_sha256"] == {"style_image": digest}


def test_data_uri_and_base64(run: Callable[..., Any]) -> None:
    tasks = run(
        """
        import base64
        text = base64.b64encode(open(PATH, "rb").read()).decode()
        say([client.run({"app": APP, "input": dict(SMALL, style_image=image)})
             for image in ("data:image/jpeg;base64," + text, text)])
        """,
        PATH=str(STYLE),
    )
    digest = hashlib.sha256(STYLE.read_bytes()).hexdigest()
    for task in tasks:
        assert download(uri_of(task))[1]["image_sha256"] == {"style_image": digest}


def test_prompts(run: Callable[..., Any]) -> None:
    """One word that looks like base64 and so arrives as a file; none, to keep the layout; line separators."""
    prompts = ["abcdefghijklmnop", "", "ein Boot, 一艘船\u2028\u0085🚤"]
    tasks = run(
        'say([client.run({"app": APP, "input": dict(SMALL, prompt=text)}) for text in TEXTS])', TEXTS=prompts
    )
    assert [download(uri_of(task))[1]["prompt"] for task in tasks] == prompts


def test_not_waiting(run: Callable[..., Any], release: str) -> None:
    said = run(
        """
        task = client.run({"app": APP, "input": SMALL}, wait=False)
        done = client.wait_for_completion(task["id"])
        again = client.get_task(task["id"])
        say([task, done, getattr(again, "data", again)])
        """
    )
    at_once, done, again = said
    assert at_once["status"] < 9
    assert not at_once["output"]
    assert done["id"] == again["id"] == at_once["id"]
    assert done["output"] == again["output"]
    assert again["status"] == numbers(release)[0]
    assert again["progress"] == 100


def test_cancel(run: Callable[..., Any], release: str, receiver: Receiver) -> None:
    said = run(
        """
        before = [client.run({"app": APP, "input": LONG}, wait=False)["id"] for _ in range(4)]
        task = client.run({"app": APP, "input": LONG, "webhook": HOOK}, wait=False)
        client.cancel(task["id"])
        client.cancel(task["id"])
        for id in before:
            client.cancel(id)
        failure = caught(client.wait_for_completion, task["id"])
        ended = client.get_task(task["id"])
        say([task["id"], failure, getattr(ended, "data", ended)])
        """,
        HOOK=receiver.url,
    )
    task_id, failure, ended = said
    assert [failure[0], failure[1].lower()] == ended_by(release, "Task cancelled")
    assert ended["status"] == numbers(release)[2]
    message = receiver.wait(task_id)
    assert (message["status"], message["output"]) == (11, None)


def test_cancel_while_streaming(run: Callable[..., Any], release: str) -> None:
    if release == "0.5.6":
        pytest.skip("it cannot read 12, and its stream ends without a word")
    failure = run(
        """
        def watch():
            for number, update in enumerate(client.run({"app": APP, "input": LONG}, stream=True)):
                if update.get("logs"):
                    client.cancel(update["id"])
        for _ in range(10):  # it may be done before the cancel comes
            failure = caught(watch)
            if failure[0] != "no error":
                break
        say(failure)
        """
    )
    assert failure[0] == "RuntimeError"
    assert "cancelled" in failure[1].lower()


def told(error: list[Any], release: str, words: str, status: int) -> bool:
    """Whether an error says what is wrong; the oldest release shows no more than the status."""
    kind, text = error
    return kind != "no error" and (str(status) if release == "0.4.29" else words) in text


def test_wrong_inputs_are_told_by_name(run: Callable[..., Any], release: str) -> None:
    wrong = {
        "prompt": {},  # the page's own first example, as it stands
        "image": {"prompt": "x", "image": "/no/such/file.png"},
        "width": SMALL | {"width": 513},
        "guidance": SMALL | {"guidance": 9},
        "style_image": SMALL | {"style_image": "not a picture"},
    }
    errors = run(
        'say([caught(client.run, {"app": APP, "input": input}) for input in WRONG.values()])', WRONG=wrong
    )
    for field, error in zip(wrong, errors, strict=True):
        assert told(error, release, f"`{field}`", 422)


def test_wrong_key(run: Callable[..., Any], release: str) -> None:
    errors = run(
        """
        strangers = [make(api_key=key, base_url=URL) for key in KEYS]
        say([caught(stranger.run, {"app": APP, "input": SMALL}) for stranger in strangers])
        """,
        KEYS=["inf_your_key", "uso_" + "A" * 43],
    )
    assert all(told(error, release, " key", 401) for error in errors)


def test_unknown_app_and_task(run: Callable[..., Any], release: str) -> None:
    app, task = run(
        """
        say([caught(client.run, {"app": "infsh/no-such-app", "input": SMALL}),
             caught(client.get_task, "nope")])
        """
    )
    assert told(app, release, "no-such-app", 404)
    assert told(task, release, "nope", 404)


def test_references_to_the_app(run: Callable[..., Any]) -> None:
    statuses = run(
        """
        names = [APP + "@latest", APP + ":run", "app/" + APP]
        say([client.run({"app": name, "input": SMALL, "infra": "cloud"})["id"] for name in names])
        """
    )
    assert len(set(statuses)) == 3


def test_sessions(run: Callable[..., Any], release: str) -> None:
    if release in ("0.4.29", "0.5.6"):
        pytest.skip("this release has none")
    said = run(
        """
        first = client.run({"app": APP, "input": SMALL, "session": "new", "session_timeout": 60}, wait=False)
        id = first["session_id"]
        client.wait_for_completion(first["id"])
        second = client.run({"app": APP, "input": SMALL, "session": id}, wait=False)
        client.wait_for_completion(second["id"])
        got, kept = client.sessions.get(id), client.sessions.keepalive(id)
        listed = [session["id"] for session in client.sessions.list()]
        client.sessions.end(id)
        ended = client.sessions.get(id)
        more = caught(client.run, {"app": APP, "input": SMALL, "session": id})
        unknown = caught(client.sessions.get, "sess_nope")
        say([id, second, got, kept, listed, ended, more, unknown])
        """
    )
    id, second, got, kept, listed, ended, more, unknown = said
    assert second["session_id"] == id
    assert got["status"] == kept["status"] == "active"
    assert kept["expires_at"] >= got["expires_at"]
    assert id in listed
    assert ended["status"] == "ended"
    assert more[0] != "no error"
    assert unknown[0] != "no error"


def test_session_handle(run: Callable[..., Any], release: str) -> None:
    if release != "latest":
        pytest.skip("shown once, with the newest")
    said = run(
        """
        with client.session(APP, input=SMALL) as session:
            task = session.call("run", SMALL)
            info = session.info()
        say([task, info, client.sessions.get(session.session_id)])
        """
    )
    task, info, after = said
    assert uri_of(task)
    assert (info["status"], after["status"]) == ("active", "ended")


def test_files_of_a_task(run: Callable[..., Any], release: str) -> None:
    if release != "latest":
        pytest.skip("shown once, with the newest")
    said = run(
        """
        id = client.run({"app": APP, "input": dict(SMALL, style_image=PATH)})["id"]
        said = [client.tasks.files(id), client.tasks.delete_files(id, role="output"), client.tasks.files(id)]
        client.tasks.delete(id, files=True)
        say([*(answer.data for answer in said), caught(client.tasks.get, id)])
        """,
        PATH=str(STYLE),
    )
    listed, removed, left, gone = said
    output, input = sorted(listed, key=lambda file: file["role"], reverse=True)
    assert removed == {"deleted": [output["id"]], "skipped": []}
    assert left == [input]
    assert gone[0] != "no error"
    assert [httpx.get(file["uri"]).status_code for file in (output, input)] == [404, 404]


def test_async_client(run: Callable[..., Any], release: str) -> None:
    if release != "latest":
        pytest.skip("shown once, with the newest")
    said = run(
        """
        from inferencesh import async_inference
        async def main():
            client = async_inference(api_key=os.environ["INFERENCE_API_KEY"], base_url=URL)
            file = await client.files.upload(PATH)
            params = {"app": APP, "input": dict(SMALL, style_image=file["uri"])}
            result = await client.run(params)
            updates = [update async for update in await client.run(params, stream=True)]
            return [result, updates]
        say(asyncio.run(main()))
        """,
        PATH=str(STYLE),
    )
    result, updates = said
    assert uri_of(result)
    assert uri_of(updates[-1])


def test_failure(run: Callable[..., Any], release: str, server: Server, receiver: Receiver) -> None:
    """Its picture is gone from the disk when the task's turn comes."""
    before, uri, task_id = run(
        """
        before = [client.run({"app": APP, "input": LONG}, wait=False)["id"] for _ in range(10)]
        file = (client.files.upload if hasattr(client, "files") else client.upload_file)(PATH)
        params = {"app": APP, "input": dict(SMALL, style_image=file["uri"]), "webhook": HOOK}
        say([before, file["uri"], client.run(params, wait=False)["id"]])
        """,
        PATH=str(STYLE),
        HOOK=receiver.url,
    )
    (server.folder / "files" / uri.rpartition("/")[2]).unlink()
    failure, ended = run(
        """
        for id in BEFORE:
            client.cancel(id)
        failure = caught(client.wait_for_completion, TASK_ID)
        ended = client.get_task(TASK_ID)
        say([failure, getattr(ended, "data", ended)])
        """,
        BEFORE=before,
        TASK_ID=task_id,
    )
    reason = "`style_image` is not on the server any more: give the picture again."
    assert [failure[0], failure[1].lower()] == ended_by(release, reason)
    assert (ended["status"], ended["error"]) == (numbers(release)[1], reason)
    message = receiver.wait(task_id)
    assert (message["status"], message["error"], message["output"]) == (10, reason, None)
