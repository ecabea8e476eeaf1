"""Foreign URLs reach the public web and nothing else."""

import asyncio
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from uso.errors import InputError
from uso.serve.fetch import Fetcher, _is_public

NAME = "pictures.example"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/picture")  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(404 if self.path.startswith("/missing") else 200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(2**16))
            if self.path == "/slow":
                while True:
                    self.wfile.write(b".")
                    time.sleep(0.05)
            self.wfile.write(b"picture")
        except OSError:
            self.server.cut.set()  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(429)
        self.send_header("Retry-After", "7")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    servers = []

    def start(tls: ssl.SSLContext | None = None) -> Any:
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.hosts, server.cut = [], threading.Event()
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """What each name resolves to, one entry a question, the last for ever."""
    answers: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        name = (host.decode() if isinstance(host, bytes) else host).lower().rstrip(".")
        if name not in answers:
            return real(host, port, *args, **kwargs)
        found = answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


def local(**options: Any) -> Fetcher:
    return Fetcher(allow_loopback=True, **options)


def fetch(fetcher: Fetcher, url: str) -> bytes:
    return asyncio.run(fetcher.fetch(url, field="style_image"))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.127.255.254", "127.0.0.1", "127.9.9.9", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.2.1", "192.88.99.1", "192.168.1.1",
        "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
        "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::",
        "2002:808:808::", "3fff::1", "fc00::1", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "ff0e::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not _is_public(ipaddress.ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(InputError, match="public") as error:
        Fetcher().check(f"http://{host}/a.png", field="style_image")
    assert error.value.field == "style_image"


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.32.0.1", "192.0.1.1", "2606:4700::1111"],
)
def test_public_addresses(address: str) -> None:
    assert _is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a", "file:///etc/passwd", "gopher://example.com", "//example.com/a", "example.com",
        "http://", "http:///a", "http://user:word@example.com/", "http://example.com:99999/", "http://[::1/",
        "http://exa\nmple.com", "http://xn--/", "http://example.com/\ud800", "",
    ],
)  # fmt: skip
def test_what_is_no_web_address(url: str) -> None:
    with pytest.raises(InputError, match="http"):
        local().check(url, field="webhook")


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "017700000001", "ⓛocalhost"])
def test_other_spellings_of_loopback(serve: Callable[..., Any], host: str) -> None:
    server = serve()
    with pytest.raises(InputError):
        fetch(Fetcher(), f"http://{host}:{server.server_port}/picture")
    assert server.hosts == []


def test_loopback_by_the_explicit_setting_only(serve: Callable[..., Any]) -> None:
    server = serve()
    for host in ("127.0.0.1", "localhost"):
        url = f"http://{host}:{server.server_port}/picture?a=b"
        assert fetch(local(), url) == b"picture"
        with pytest.raises(InputError, match="public"):
            fetch(Fetcher(), url)
    assert server.hosts == [f"{host}:{server.server_port}" for host in ("127.0.0.1", "localhost")]
    with pytest.raises(InputError, match="public"):
        fetch(local(), "http://10.0.0.1/")


def test_policies(serve: Callable[..., Any], names: dict[str, list[list[str]]]) -> None:
    names[NAME] = names["other.example"] = [["127.0.0.1"]]
    port = serve().server_port
    listed = local(policy="allow-list", hosts=["Pictures.Example"])
    assert fetch(listed, f"http://pictures.EXAMPLE.:{port}/") == b"picture"
    with pytest.raises(InputError, match="not among the hosts"):
        fetch(listed, f"http://other.example:{port}/")
    with pytest.raises(InputError, match="upload"):
        fetch(local(policy="off"), f"http://{NAME}:{port}/")
    names[NAME] = [["10.0.0.1"]]  # a listed name is no way round the rule
    with pytest.raises(InputError, match=r"10\.0\.0\.1.*public"):
        fetch(listed, f"http://{NAME}:{port}/")


def test_a_name_that_changes_its_address(
    serve: Callable[..., Any], names: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once: what was checked is what is connected to."""
    server, fetcher = serve(), Fetcher()
    names[NAME] = [["8.8.8.8"], ["127.0.0.1"]]
    asked: list[str] = []

    async def connect(self: Any, host: str, port: int, *args: Any) -> Any:
        asked.append(host)
        raise OSError("not from here")

    monkeypatch.setattr("httpcore.AnyIOBackend.connect_tcp", connect)
    with pytest.raises(InputError, match="not from here"):
        fetch(fetcher, f"http://{NAME}:{server.server_port}/picture")
    assert asked == ["8.8.8.8"]
    with pytest.raises(InputError, match="public"):
        fetch(fetcher, f"http://{NAME}:{server.server_port}/picture")
    assert server.hosts == []


def test_a_name_with_one_bad_address_among_good_ones(names: dict[str, list[list[str]]]) -> None:
    names[NAME] = [["8.8.8.8", "169.254.169.254"]]
    with pytest.raises(InputError, match=r"169\.254"):
        fetch(Fetcher(), f"http://{NAME}/")


def test_the_next_address_when_one_is_down(
    serve: Callable[..., Any], names: dict[str, list[list[str]]]
) -> None:
    names[NAME] = [["127.0.0.2", "127.0.0.1"]]
    assert fetch(local(), f"http://{NAME}:{serve().server_port}/picture") == b"picture"


def test_a_redirect_to_this_machine(serve: Callable[..., Any], names: dict[str, list[list[str]]]) -> None:
    server = serve()
    names[NAME] = [["127.0.0.1"]]
    with pytest.raises(InputError, match="elsewhere"):
        fetch(local(), f"http://{NAME}:{server.server_port}/redirect")
    assert len(server.hosts) == 1


def test_an_endless_body_is_cut(serve: Callable[..., Any]) -> None:
    server = serve()
    with pytest.raises(InputError, match="above the limit of 1 MiB"):
        fetch(local(max_bytes=2**20), f"http://127.0.0.1:{server.server_port}/endless")
    assert server.cut.wait(60)


def test_a_slow_body_is_cut(serve: Callable[..., Any]) -> None:
    server, began = serve(), time.monotonic()
    with pytest.raises(InputError, match="more than 3 seconds"):  # in fewer, a busy machine may send nothing
        fetch(local(seconds=3), f"http://127.0.0.1:{server.server_port}/slow")
    assert time.monotonic() - began < 20
    assert server.cut.wait(60)


def test_missing_and_unreachable(serve: Callable[..., Any]) -> None:
    server = serve()
    with pytest.raises(InputError, match="404") as error:
        fetch(local(), f"http://127.0.0.1:{server.server_port}/missing?secret")
    assert "secret" not in str(error.value)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="cannot be reached"):
            fetch(local(), f"http://127.0.0.1:{closed.getsockname()[1]}/")
    for host in ("no-such-name.invalid", "a..b", "a" * 64):
        with pytest.raises(InputError, match="cannot be reached"):
            fetch(local(), f"http://{host}/")


def test_post_tells_status_and_headers(serve: Callable[..., Any]) -> None:
    url = f"http://127.0.0.1:{serve().server_port}/hook"
    status, headers = asyncio.run(local().post(url, b"{}", {"Content-Type": "application/json"}))
    assert status == 429
    assert headers["retry-after"] == "7"


def test_tls_is_for_the_name_not_the_address(
    serve: Callable[..., Any],
    names: dict[str, list[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    names[NAME] = names["other.example"] = [["127.0.0.1"]]
    authority, heard = trustme.CA(), []
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(tls)
    tls.sni_callback = lambda connection, name, context: heard.append(name)
    server = serve(tls)
    assert fetch(local(), f"https://{NAME}:{server.server_port}/picture") == b"picture"
    assert heard == [NAME]
    assert server.hosts == [f"{NAME}:{server.server_port}"]
    with pytest.raises(InputError, match="certificate"):
        fetch(local(), f"https://other.example:{server.server_port}/picture")
