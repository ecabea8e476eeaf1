"""The API under load, under nonsense and under kill -9: a real server, on nano."""

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server import APP, LONG, SECONDS, SMALL, STYLE, Receiver, Server
from uso.serve.store import Store

TINY = SMALL | {"num_steps": 1}
ROOMY = {"USO_QUEUE_LIMIT": "1000", "USO_KEY_RATE": "1000000", "USO_KEY_QUEUE": "1000"}
TERMINAL = {10, 11, 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("data"), environment=ROOMY) as server:
        yield server


def submit(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/apps/run", json={"app": APP, "input": TINY, **more})


def wait(client: httpx.Client, task_ids: list[str]) -> dict[str, dict[str, Any]]:
    """The tasks once all have ended."""
    ended: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 3 * SECONDS
    while open_tasks := [task_id for task_id in task_ids if task_id not in ended]:
        assert time.monotonic() < deadline, f"{len(open_tasks)} of {len(task_ids)} tasks have not ended"
        for task_id in open_tasks:
            task = client.get(f"/tasks/{task_id}").raise_for_status().json()["data"]
            if task["status"] not in TERMINAL:
                time.sleep(0.2)
                break
            ended[task_id] = task
    return ended


@pytest.mark.timeout(1200)  # the machine may be busy
def test_200_tasks_from_20_clients(server: Server) -> None:
    """All end, in order of arrival; page and health answer meanwhile, and memory stays flat."""

    def be_a_client(number: int) -> list[str]:
        with server.http() as client:
            return [submit(client).raise_for_status().json()["data"]["id"] for _ in range(10)]

    slowest: Counter[str] = Counter()
    done = threading.Event()

    def visit() -> None:
        with httpx.Client(base_url=server.url, timeout=SECONDS) as visitor:
            while not done.wait(0.5):
                for path in ("/", "/healthz", "/readyz"):
                    began = time.monotonic()
                    visitor.get(path).raise_for_status()
                    slowest[path] = max(slowest[path], time.monotonic() - began)  # type: ignore[assignment]

    process = psutil.Process(server.process.pid if server.process else None)
    with server.http() as client:
        wait(client, [submit(client).json()["data"]["id"] for _ in range(20)])
    memory = process.memory_info().rss
    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        began = time.monotonic()
        with ThreadPoolExecutor(20) as clients:
            task_ids = list(itertools.chain.from_iterable(clients.map(be_a_client, range(20))))
        submitted = time.monotonic() - began
        with server.http() as client:
            tasks = wait(client, task_ids)
        print(
            f"200 tasks taken in {submitted:.1f} s, done in {time.monotonic() - began:.1f} s; {dict(slowest)}"
        )
    finally:
        done.set()
        visitor.join()
    assert len(set(task_ids)) == 200
    assert {task["status"] for task in tasks.values()} == {10}
    assert max(slowest.values()) < 10
    grown = (process.memory_info().rss - memory) / 2**20
    print(f"memory grew by {grown:.0f} MiB from {memory / 2**20:.0f}")
    assert grown < 100, "a picture kept of each task would be 150 at least"
    store = Store(server.folder)
    rows = store.all("SELECT id, updated_at FROM tasks ORDER BY number")
    store.close()
    ends = [row["updated_at"] for row in rows if row["id"] in tasks]
    assert len(ends) == 200
    assert ends == sorted(ends)


def test_one_task_for_50_tries_with_one_idempotency_key(server: Server) -> None:
    with server.http() as client, ThreadPoolExecutor(20) as pool:
        client.headers["Idempotency-Key"] = "the same"
        answers = list(pool.map(lambda _: submit(client), range(50)))
        assert {answer.status_code for answer in answers} <= {200, 201}
        (task_id,) = {answer.json()["data"]["id"] for answer in answers}
        other = submit(client, webhook="https://example.com/")
        assert other.status_code == 409
        assert other.json()["error"]["code"] == "conflict"
        wait(client, [task_id])


def test_nothing_said_to_the_api_is_its_fault(server: Server) -> None:
    """schemathesis makes requests from the OpenAPI document, right and wrong: no 5xx, all as it says."""
    checks = [
        "not_a_server_error", "status_code_conformance", "content_type_conformance",
        "response_schema_conformance", "ignored_auth", "unsupported_method",
    ]  # fmt: skip
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json",
        f"--checks={','.join(checks)}", "--phases=examples,coverage,fuzzing", "--max-examples=20",
        f"--header=Authorization:Bearer {server.key}", "--max-time=30", f"--request-timeout={SECONDS}",
        "--generation-deterministic", "--no-color",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, cwd=server.folder)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr


@pytest.mark.timeout(1200)
def test_sigterm_while_one_is_drawn_and_streams_are_open(tmp_path: Path) -> None:
    """It ends in order, streams too, and the next process draws what waits."""
    with Server(tmp_path) as server, ThreadPoolExecutor(3) as watchers:
        with server.http() as client:
            task_ids = [submit(client, input=LONG).json()["data"]["id"] for _ in range(3)]
            begun = threading.Event()

            def watch(task_id: str) -> int:
                with client.stream("GET", f"/tasks/{task_id}/stream") as stream:
                    for line in stream.iter_lines():
                        if (task := json.loads(line))["status"] == 7:
                            begun.set()
                return int(task["status"])

            watched = [watchers.submit(watch, task_id) for task_id in task_ids]
            assert begun.wait(SECONDS)
            server.terminate()
            seen = [each.result() for each in watched]
        assert set(seen) <= {2, 10}, "ended, or left to wait; none was broken off"
        assert seen[-1] == 2
        server.start()
        with server.http() as client:
            tasks = wait(client, task_ids)
        assert {task["status"] for task in tasks.values()} == {10}


@pytest.mark.timeout(1200)
def test_a_hung_device_ends_the_process_and_the_next_one_draws(tmp_path: Path) -> None:
    with Server(tmp_path, environment={"USO_STEP_LIMIT": "0.0001"}) as server:
        with server.http() as client:
            task_ids = [submit(client).json()["data"]["id"]]
        assert server.process
        assert server.process.wait(timeout=SECONDS) == 1
        server.environment = {}
        server.start()
        with server.http() as client:
            assert [task["status"] for task in wait(client, task_ids).values()] == [10]


@pytest.mark.timeout(1800)  # six starts of the server, on a busy machine
def test_kill_9_five_times_under_load(tmp_path: Path) -> None:
    """Every acknowledged task reaches exactly one terminal state and is told of by one message id."""
    server, receiver = Server(tmp_path, environment=ROOMY), Receiver()
    acknowledged: list[str] = []
    ended: dict[str, int] = {}
    allowed = 0
    stop = threading.Event()

    def keep_submitting() -> None:
        picture = STYLE.read_bytes()
        with server.http() as client:
            while not stop.wait(0.1):
                if len(acknowledged) >= allowed:
                    continue
                try:
                    asked = {"files": [{"filename": "style.jpg", "content_type": "image/jpeg"}]}
                    file = client.post("/files", json=asked).raise_for_status().json()["data"][0]
                    httpx.put(file["upload_url"], content=picture, timeout=SECONDS).raise_for_status()
                    input = TINY | {"style_image": file["uri"]}
                    answer = submit(client, input=input, webhook=receiver.url).raise_for_status()
                    acknowledged.append(answer.json()["data"]["id"])
                except httpx.TransportError:
                    pass  # killed, or not up again

    def note_ends(client: httpx.Client) -> None:
        for task_id in acknowledged[:]:
            status = client.get(f"/tasks/{task_id}").raise_for_status().json()["data"]["status"]
            if status in TERMINAL:
                assert ended.setdefault(task_id, status) == status

    submitters = [threading.Thread(target=keep_submitting) for _ in range(4)]
    try:
        with server:
            for thread in submitters:
                thread.start()
            for _ in range(5):
                allowed = len(acknowledged) + 12
                while len(acknowledged) < allowed - 6:
                    time.sleep(0.05)
                with server.http() as client:
                    note_ends(client)
                time.sleep(random.uniform(0, 0.5))
                server.kill()
                server.start()
            stop.set()
            for thread in submitters:
                thread.join()
            with server.http() as client:
                tasks = wait(client, acknowledged)
                note_ends(client)
            for task in tasks.values():
                if task["status"] == 10:
                    httpx.get(task["output"]["generated_image"]["uri"]).raise_for_status()
            deadline = time.monotonic() + SECONDS
            while {message["id"] for message, _ in receiver.got} != set(acknowledged):
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        stop.set()
        receiver.close()
    print(f"{len(acknowledged)} tasks, {Counter(ended.values())}, {len(receiver.got)} messages")
    assert set(ended) == set(acknowledged)
    assert Counter(ended.values())[10] > 0.8 * len(acknowledged)
    message_ids: dict[str, set[str]] = {}
    for message, headers in receiver.got:
        message_ids.setdefault(message["id"], set()).add(headers["webhook-id"])
    assert all(len(each) == 1 for each in message_ids.values())
