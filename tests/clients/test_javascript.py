"""The same calls with the unmodified `@inferencesh/sdk`, in Node."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.environments import javascript_client, run_javascript
from tests.clients.test_python import download
from tests.server import STYLE, Receiver, Server, uri_of


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Callable[..., Any]:
    javascript_client()

    return functools.partial(run_javascript, server, tmp_path)


def test_run_and_get_result(run: Callable[..., Any]) -> None:
    task = run("say(await client.run({ app: APP, input: SMALL }));")
    assert task["status"] == 10
    image, parameters = download(uri_of(task))
    assert image.size == (512, 512)
    assert parameters["seed"] == 7


def test_live_updates(run: Callable[..., Any]) -> None:
    said = run(
        """
        const seen = [];
        const result = await client.run({ app: APP, input: { ...SMALL, num_steps: 50 } }, {
          onUpdate: (update) => seen.push(update),
          onPartialUpdate: (update) => seen.push(update),
        });
        say([seen, result]);
        """
    )
    seen, result = said
    progress = [update["progress"] for update in seen]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert any(0 < value < 100 for value in progress)
    assert uri_of(result) == uri_of(seen[-1])
    assert "4" in " ".join(result["logs"])


def test_polling(run: Callable[..., Any]) -> None:
    task = run("say(await client.run({ app: APP, input: SMALL }, { stream: false, pollIntervalMs: 100 }));")
    assert uri_of(task)


def test_webhook_and_not_waiting(run: Callable[..., Any], receiver: Receiver) -> None:
    task = run(
        "say(await client.run({ app: APP, input: SMALL, webhook: HOOK }, { wait: false }));",
        HOOK=receiver.url,
    )
    assert task["status"] < 9
    message = receiver.wait(task["id"])
    assert message["status"] == 9
    assert uri_of(message)


def test_files(run: Callable[..., Any]) -> None:
    said = run(
        """
        const bytes = fs.readFileSync(PATH);
        const blob = new Blob([bytes], { type: "image/jpeg" });
        const file = await client.files.upload(blob, { filename: "style.jpg" });
        const text = bytes.toString("base64");
        const images = [file.uri, { uri: file.uri }, blob, "data:image/jpeg;base64," + text, text];
        const tasks = [];
        for (const image of images)
          tasks.push(await client.run({ app: APP, input: { ...SMALL, style_image: image } }));
        say([file, tasks]);
        """,
        PATH=str(STYLE),
    )
    file, tasks = said
    assert (file["filename"], file["content_type"]) == ("style.jpg", "image/jpeg")
    assert httpx.get(file["uri"]).raise_for_status().content == STYLE.read_bytes()
    digest = hashlib.sha256(STYLE.read_bytes()).hexdigest()
    for task in tasks:
        assert download(uri_of(task))[1]["image_sha256"] == {"style_image": digest}


def test_cancel(run: Callable[..., Any]) -> None:
    said = run(
        """
        let task, failure;
        for (let tries = 0; tries < 10; tries++) {  // it may be done before the cancel comes
          task = await client.run({ app: APP, input: LONG }, { wait: false });
          const ended = caught(client.tasks.watch(task).done);
          await client.tasks.cancel(task.id);
          failure = await ended;
          if (failure[0] !== "no error") break;
        }
        say([failure, await client.tasks.get(task.id)]);
        """
    )
    failure, ended = said
    assert failure == ["Error", "task cancelled"]
    assert ended["data"]["status"] == 12


def test_errors(run: Callable[..., Any]) -> None:
    said = run(
        """
        const stranger = sdk.inference({ apiKey: "inf_your_key", baseUrl: URL });
        say([
          await caught(client.run({ app: APP, input: {} })),
          await caught(client.run({ app: APP, input: { ...SMALL, width: 513 } })),
          await caught(client.run({ app: "infsh/no-such-app", input: SMALL })),
          await caught(client.tasks.get("nope")),
          await caught(stranger.run({ app: APP, input: SMALL })),
        ]);
        """
    )
    for (kind, text), words in zip(said, ("`prompt`", "`width`", "no-such-app", "nope", " key"), strict=True):
        assert kind != "no error"
        assert words in text


def test_sessions(run: Callable[..., Any]) -> None:
    said = run(
        """
        const first = await client.run({ app: APP, input: SMALL, session: "new" });
        const id = first.session_id;
        const second = await client.run({ app: APP, input: SMALL, session: id });
        const active = (await client.sessions.keepalive(id)).data;
        await client.sessions.end(id);
        say([id, second, active, (await client.sessions.get(id)).data]);
        """
    )
    id, second, active, ended = said
    assert second["session_id"] == id
    assert (active["status"], ended["status"]) == ("active", "ended")


def test_the_app_tells_its_schema(run: Callable[..., Any]) -> None:
    app = run("say((await client.apps.get(APP)).data);")
    assert app["version"]["input_schema"]["required"] == ["prompt"]


def test_delete(run: Callable[..., Any]) -> None:
    said = run(
        """
        const task = await client.run({ app: APP, input: SMALL });
        await client.tasks.delete(task.id);
        say([task, await caught(client.tasks.get(task.id))]);
        """
    )
    task, gone = said
    assert gone[0] != "no error"
    assert httpx.get(uri_of(task)).status_code in (200, 404)
