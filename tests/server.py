"""The server as its users start it, for tests that call it over the wire, and a receiver of its webhooks."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx

ROOT = Path(__file__).parents[1]
SECONDS = 240  # to wait for anything; the machine may be busy
APP = "infsh/bytedance-uso"
SMALL = {"prompt": "a small red boat", "width": 512, "height": 512, "num_steps": 2, "seed": 7}
LONG = {"prompt": "a long one", "width": 1536, "height": 1536, "num_steps": 50}
SUBJECT, STYLE = (ROOT / "assets" / "examples" / name for name in ("fox.jpg", "pop-art.jpg"))


@dataclass
class Server:
    """`python app.py` with nano, keys and loopback URLs, in a data folder of its own."""

    folder: Path
    flags: tuple[str, ...] = ("--require-keys", "--allow-loopback-urls")
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    key: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, on the same port as before, and wait until tasks are taken."""
        environment = os.environ | {"USO_DATA_DIR": str(self.folder)} | self.environment
        if not self.key:
            command = [sys.executable, "-m", "uso", "keys", "create", "tests"]
            out = subprocess.check_output(command, text=True, cwd=ROOT, env=environment)
            self.key = out.splitlines()[-1]
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, str(ROOT / "app.py"), "--model", "nano", "--port", port, *self.flags]
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment)
        deadline = time.monotonic() + SECONDS
        while True:
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server is not ready"
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)

    def kill(self) -> None:
        """As kill -9 does; nothing when it does not run."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def terminate(self) -> None:
        """SIGTERM, which must end it in order."""
        assert self.process
        self.process.terminate()
        assert self.process.wait(timeout=SECONDS) == 0

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self.terminate()
        finally:
            self.kill()

    def http(self) -> httpx.Client:
        """A plain client with the key."""
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=SECONDS
        )


class Receiver:
    """A webhook's receiver on loopback; `got` are the messages, parsed, and their headers."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, Any], dict[str, str]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((json.loads(body), {k.lower(): v for k, v in self.headers.items()}))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/webhook"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def wait(self, task_id: str) -> dict[str, Any]:
        """The message of a task, which must come once."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if found := [message for message, _ in self.got if message["id"] == task_id]:
                assert len(found) == 1
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"no webhook of {task_id}; there are {self.got}")


def uri_of(task: dict[str, Any]) -> str:
    uri = task["output"]["generated_image"]["uri"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\S+", uri)
    return uri
