"""Foreign URLs: pictures to read and webhooks to call, without reaching what strangers must not reach.

A name is resolved once and the connection goes to the very address that was checked, so a name that changes
its mind in between gains nothing; the name itself stays in the Host header and in TLS. Redirects are not
followed, bodies are not unpacked, size and time are bounded.
"""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import httpcore
import httpx

from uso.errors import InputError
from uso.images import MAX_BYTES

Policy = Literal["off", "allow-list", "public"]
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# All of IPv6 that is handed out; what stands for an IPv4 address (mapped, compatible, NAT64) lies outside.
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
# Python's `is_global` takes these or parts of them as public: protocol assignments (RFC 6890), relays and
# tunnels, addresses for documentation (RFC 9637).
_REFUSED = [
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
]
# UnicodeError: a name that cannot be one, for the resolver
_NO_ANSWER = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,
    UnicodeError,
)


class Fetcher:
    """Reads and posts to URLs that strangers give.

    Whatever the policy, every address of a name must be public, or loopback where that is allowed.

    Args:
        policy: "off" refuses all, "allow-list" takes `hosts` only, "public" any host.
        hosts: names, for "allow-list".
        allow_loopback: this machine's own addresses may be reached too, whatever `hosts` says.
        max_bytes: of a body that is read.
        seconds: for one exchange, from resolving the name to the last byte.
    """

    def __init__(
        self,
        *,
        policy: Policy = "public",
        hosts: Collection[str] = (),
        allow_loopback: bool = False,
        max_bytes: int = MAX_BYTES,
        seconds: float = 30.0,
    ) -> None:
        self.policy = policy
        self.hosts = {host.lower().rstrip(".") for host in hosts}
        self.allow_loopback = allow_loopback
        self.max_bytes = max_bytes
        self.seconds = seconds
        self._tls = httpx.create_ssl_context()

    def check(self, url: str, *, field: str) -> None:
        """Raise InputError, without touching the network, when it is plain that the URL would be refused."""
        self._parse(url, field)

    async def fetch(self, url: str, *, field: str) -> bytes:
        """The body behind a URL. InputError when it is refused, not found, too large or too slow."""
        async with self._exchange("GET", url, field) as response:
            if 300 <= response.status < 400:
                raise _problem(field, f"{_shown(url)} leads elsewhere: give the final address.")
            if response.status != 200:
                raise _problem(
                    field, f"{_shown(url)} answers {response.status}: give one that opens without a login."
                )
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > self.max_bytes:
                    limit = f"{self.max_bytes / 2**20:g} MiB"
                    raise _problem(field, f"{_shown(url)} is above the limit of {limit}: make it smaller.")
            return bytes(body)

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, field: str = "webhook"
    ) -> tuple[int, dict[str, str]]:
        """Status and headers (names in lower case) of the answer, whose body is not read.

        InputError when the URL is refused, nobody answers, or not in time.
        """
        async with self._exchange("POST", url, field, body, headers) as response:
            return response.status, {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
            }

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        url: str,
        field: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpcore.Response]:
        target = self._parse(url, field)
        sent = {"Host": target.netloc.decode("ascii"), "User-Agent": "uso", "Accept-Encoding": "identity"}
        where = httpcore.URL(
            scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
        )
        try:
            # One pool an exchange: no connection outlives the check of its address.
            async with (
                asyncio.timeout(self.seconds),
                httpcore.AsyncConnectionPool(self._tls, network_backend=_Guard(self._admits)) as pool,
                pool.stream(
                    method, where, headers=list((sent | dict(headers or {})).items()), content=body
                ) as response,
            ):
                yield response
        except _Refused as error:
            raise _not_public(field, f"{target.host} is {error}, which") from None
        except TimeoutError:
            raise _problem(
                field, f"{_shown(url)} took more than {self.seconds:g} seconds: try again, or another."
            ) from None
        except _NO_ANSWER as error:
            reason = str(error) or type(error).__name__
            raise _problem(
                field, f"{_shown(url)} cannot be reached ({reason}): check the address."
            ) from error

    def _parse(self, url: str, field: str) -> httpx.URL:
        try:
            target = httpx.URL(url)
            valid = bool(target.host) and (target.port or 1) in range(1, 65536)
        except (httpx.InvalidURL, UnicodeError):
            valid = False
        if not valid or target.scheme not in ("http", "https") or target.userinfo:
            raise _problem(
                field, f"{_shown(url)} is not an http(s) URL with a host and without a password: give one."
            )
        if self.policy == "off":
            raise _problem(field, "addresses of other hosts are not used here: upload the file instead.")
        try:
            address = ipaddress.ip_address(target.host)
        except ValueError:
            address = None
        if address is not None and not self._admits(address):
            raise _not_public(field, str(address))
        own = self.allow_loopback and (
            target.host == "localhost" or (address is not None and address.is_loopback)
        )
        if self.policy == "allow-list" and not own and target.host.rstrip(".") not in self.hosts:
            raise _problem(
                field,
                f"{target.host} is not among the hosts allowed here: use one of them, or upload the file.",
            )
        return target

    def _admits(self, address: _Address) -> bool:
        return _is_public(address) or (self.allow_loopback and address.is_loopback)


class _Refused(Exception):
    """An address that must not be reached."""


class _Guard(httpcore.AsyncNetworkBackend):
    """Connects to a name when all its addresses are admitted, and by one of these addresses."""

    def __init__(self, admits: Callable[[_Address], bool]) -> None:
        self._admits = admits
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not self._admits(ipaddress.ip_address(address)):
                raise _Refused(address)
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                failure = error
        raise failure


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address not in _IPV6_UNICAST:
        return False
    special = address.is_multicast or address.is_reserved or any(address in network for network in _REFUSED)
    return address.is_global and not special


def _problem(field: str, text: str) -> InputError:
    return InputError(f"`{field}`: {text}", field=field)


def _not_public(field: str, what: str) -> InputError:
    remedy = "use a public one, or ask whoever runs this server"
    return _problem(field, f"{what} is not a public address: {remedy}.")


def _shown(url: str) -> str:
    """A URL for a message: short, and without the query, which may hold a secret."""
    return repr(url.partition("?")[0][:100])
