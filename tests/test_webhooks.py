"""Webhooks reach a real receiver that is down, slow, angry or gone; one message id for all tries."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from uso.errors import InputError
from uso.serve import webhooks
from uso.serve.fetch import Fetcher
from uso.serve.store import Store
from uso.serve.webhooks import Deliverer, payload

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TASK = {
    "id": "task_1",
    "state": "completed",
    "output": {"generated_image": {"uri": "http://127.0.0.1/é.png"}},
    "error": None,
    "session_id": None,
    "created_at": 1_700_000_000.0,
    "updated_at": 1_700_000_005.25,
}


class Receiver:
    """Notes what arrives; answers in turn with a status and headers as told, then with 200."""

    def __init__(self, answers: list[tuple[int, dict[str, str]]], port: int = 0) -> None:
        self.got: list[tuple[float, dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append((time.time(), headers, body))
                status, more = answers.pop(0) if answers else (200, {})
                self.send_response(status)
                for item in more.items():
                    self.send_header(*item)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def deliver(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Deliverer]]:
    """Starts a deliverer whose hours are tenths of seconds."""
    monkeypatch.setattr(webhooks, "POLL_SECONDS", 0.02)
    started: list[Deliverer] = []

    def start(**options: Any) -> Deliverer:
        fetcher = Fetcher(allow_loopback=options.pop("allow_loopback", True))
        deliverer = Deliverer(store, fetcher, **({"delays": (0.1,) * 8} | options))
        deliverer.start()
        started.append(deliverer)
        return deliverer

    yield start
    for deliverer in started:
        deliverer.stop()


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    receivers: list[Receiver] = []

    def start(*answers: tuple[int, dict[str, str]], port: int = 0) -> Receiver:
        receivers.append(Receiver(list(answers), port))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()


def put(store: Store, url: str, message: str = "msg_1", task: dict[str, Any] = TASK) -> None:
    now = time.time()
    with store.transaction() as db:
        db.execute(
            "INSERT INTO outbox (id, task_id, url, body, created_at, next_try_at) VALUES (?, ?, ?, ?, ?, ?)",
            [message, f"task of {message}", url, payload(task), now, now],
        )


def row_of(store: Store, message: str = "msg_1") -> dict[str, Any]:
    """A message's row of the outbox."""
    row = store.one("SELECT * FROM outbox WHERE id = ?", message)
    assert row
    return dict(row)


def settled(store: Store) -> dict[str, Any]:
    """The row once nothing is left to do."""
    deadline = time.monotonic() + 60
    while (row := row_of(store))["next_try_at"] is not None:
        assert time.monotonic() < deadline, f"not settled: {row}"
        time.sleep(0.02)
    return row


def tried(store: Store) -> None:
    """Wait until the first try has failed."""
    deadline = time.monotonic() + 60
    while not row_of(store)["tries"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_payload_is_the_pages() -> None:
    assert json.loads(payload(TASK)) == {
        "id": "task_1",
        "status": 9,
        "output": {"generated_image": {"uri": "http://127.0.0.1/é.png"}},
        "error": "",
        "session_id": None,
        "created_at": "2023-11-14T22:13:20.000Z",
        "updated_at": "2023-11-14T22:13:25.250Z",
    }
    assert payload(TASK).isascii()
    failed = json.loads(
        payload(TASK | {"state": "failed", "output": None, "error": "No.", "session_id": "s"})
    )
    assert (failed["status"], failed["error"], failed["session_id"]) == (10, "No.", "s")
    assert json.loads(payload(TASK | {"state": "cancelled"}))["status"] == 11


def test_a_receiver_that_is_well(
    store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]
) -> None:
    receiver = receive()
    put(store, receiver.url)
    deliver()
    row = settled(store)
    assert row["delivered_at"]
    assert row["tries"] == 1
    ((_, headers, body),) = receiver.got
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == "msg_1"
    assert "webhook-signature" not in headers
    assert body == payload(TASK)
    time.sleep(0.2)
    assert len(receiver.got) == 1


def test_500_then_200_with_the_same_id(
    store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]
) -> None:
    receiver = receive((500, {}), (503, {}), (302, {"Location": "http://127.0.0.1/"}))
    put(store, receiver.url)
    deliver(secret=SECRET)
    assert settled(store)["tries"] == 4
    times, headers, bodies = zip(*receiver.got, strict=True)
    assert {each["webhook-id"] for each in headers} == {"msg_1"}
    assert set(bodies) == {payload(TASK)}
    assert all(0.09 < later - earlier < 10 for earlier, later in itertools.pairwise(times))


def test_down_then_up(store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]) -> None:
    first = receive()
    port = first.server.server_port
    first.close()
    put(store, first.url)
    deliver(delays=(0.2,) * 200)
    tried(store)
    receiver = receive(port=port)
    row = settled(store)
    assert row["delivered_at"]
    assert row["tries"] > 1
    assert len(receiver.got) == 1


def test_a_restart_loses_none(store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]) -> None:
    receiver = receive((500, {}))
    put(store, receiver.url)
    before = deliver(delays=(60,))
    tried(store)
    before.stop()
    assert len(receiver.got) == 1
    with store.transaction() as db:
        db.execute("UPDATE outbox SET next_try_at = ?", [time.time()])  # a minute has passed
    deliver()
    assert settled(store)["delivered_at"]
    assert [headers["webhook-id"] for _, headers, _ in receiver.got] == ["msg_1", "msg_1"]


def test_410_stops(store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]) -> None:
    receiver = receive((410, {}))
    put(store, receiver.url)
    deliver()
    row = settled(store)
    assert row["delivered_at"] is None
    assert "410" in row["error"]
    time.sleep(0.3)
    assert len(receiver.got) == 1


def test_given_up_after_the_last_delay(
    store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]
) -> None:
    receiver = receive(*[(500, {})] * 9)
    put(store, receiver.url)
    deliver(delays=(0.05, 0.05))
    row = settled(store)
    assert (row["tries"], row["delivered_at"], len(receiver.got)) == (3, None, 3)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_honoured(
    kind: str, store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]
) -> None:
    date = int(time.time()) + 3
    value = "1" if kind == "seconds" else formatdate(date, usegmt=True)
    receiver = receive((429, {"Retry-After": value}))
    put(store, receiver.url)
    deliver()
    assert settled(store)["delivered_at"]
    (first, *_), (second, *_) = receiver.got
    assert second >= (first + 1 if kind == "seconds" else date)


def test_a_slow_receiver_does_not_hold_up_the_others(
    store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]
) -> None:
    receiver = receive()
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # accepts, never answers
        put(store, f"http://127.0.0.1:{silent.server_port}/", "msg_slow")
        put(store, receiver.url)
        deliver()
        assert settled(store)["delivered_at"]
        assert row_of(store, "msg_slow")["tries"] == 0, "still on its way"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_guarded_like_other_urls(
    host: str, store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]
) -> None:
    """When it is sent, too: a name may have got another address since the task was taken."""
    receiver = receive()
    put(store, receiver.url.replace("127.0.0.1", host))
    deliver(allow_loopback=False, delays=(0.05,))
    row = settled(store)
    assert "public" in row["error"]
    assert receiver.got == []


def test_a_fault_of_ours_is_a_failed_try(
    store: Store,
    deliver: Callable[..., Any],
    receive: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver = receive((500, {"Retry-After": "soon"}))
    monkeypatch.setattr(webhooks, "_seconds", lambda text: 1 / 0)
    put(store, receiver.url)
    deliver()
    row = settled(store)
    assert (row["tries"], len(receiver.got)) == (2, 2)
    assert row["delivered_at"]
    assert "ZeroDivisionError" in caplog.text


def test_signature(store: Store, deliver: Callable[..., Any], receive: Callable[..., Any]) -> None:
    receiver = receive()
    put(store, receiver.url)
    deliver(secret=SECRET)
    settled(store)
    ((_, headers, body),) = receiver.got
    assert Webhook(SECRET).verify(body, headers)["id"] == "task_1"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"task_1", b"task_2"), headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(body, headers)
    old = headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) - 600)}
    with pytest.raises(WebhookVerificationError, match="old"):
        Webhook(SECRET).verify(body, old)


@pytest.mark.parametrize("secret", ["hello", "whsec_", "whsec_" + "A" * 8, "whsec_" + "A" * 100, "whsec_é"])
def test_secrets_that_are_none(secret: str, store: Store) -> None:
    with pytest.raises(InputError, match="base64"):
        Deliverer(store, Fetcher(), secret=secret)
