"""API keys: made and shown once, kept as SHA-256; how often each may ask; and no log that shows one."""

import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import sqlite3
import threading
import time
from typing import Any

from uso.errors import InputError, USOError
from uso.serve.store import Store

MARK = "uso_"
SHOWN = len(MARK) + 6  # characters of a key that lists and logs may show
USED_SECONDS = 60.0  # `used_at` is at most this old; not written at each request

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY = re.compile(rf"({MARK}[\w-]{{6}})[\w-]{{10,}}")
# in a header line, in a dict of headers and among the bytes that a web server passes on
_AUTHORIZATION = re.compile(r"(?i)(\bbearer\s+|authorization\W{1,6}(?!bearer))[^\s'\",;)\]}]+")


class TooOften(USOError):
    """A key asked more often than it may; the next request is welcome in `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Keys:
    """The keys in a store, which is read at each request: a revoked key ends at once."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, name: str) -> str:
        """Make a key and return it: nobody can read it again. InputError: a bad name, or one in use."""
        if not _NAME.fullmatch(name):
            raise InputError(
                f"NAME must begin with a letter or digit and have up to 64 of them or . _ @ -, got {name!r}."
            )
        key = MARK + secrets.token_urlsafe(32)
        with self._store.transaction() as db:
            if db.execute("SELECT 1 FROM keys WHERE name = ? AND revoked_at IS NULL", [name]).fetchone():
                raise InputError(f"There is a key {name!r} already: revoke it first, or take another name.")
            db.execute(
                "INSERT INTO keys (id, name, prefix, sha256, created_at) VALUES (?, ?, ?, ?, ?)",
                ["key_" + secrets.token_urlsafe(9), name, key[:SHOWN], _digest(key), time.time()],
            )
        return key

    def all(self) -> list[sqlite3.Row]:
        """Rows of the table `keys`, revoked ones too, oldest first."""
        return self._store.all("SELECT * FROM keys ORDER BY created_at")

    def revoke(self, name: str) -> None:
        """End a key. InputError when no such key is in use."""
        with self._store.transaction() as db:
            ended = db.execute(
                "UPDATE keys SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL", [time.time(), name]
            ).rowcount
        if not ended:
            raise InputError(f"There is no key {name!r} in use: see `python -m uso keys list`.")

    def verify(self, presented: str) -> str | None:
        """The id of the key that was presented; None for one that is unknown or revoked.

        Compares with every key in constant time.
        """
        digest, found = _digest(presented), None
        for row in self._store.all("SELECT id, sha256, used_at FROM keys WHERE revoked_at IS NULL"):
            if hmac.compare_digest(row["sha256"], digest):
                found = row
        if found is None:
            return None
        now = time.time()
        if now - (found["used_at"] or 0) > USED_SECONDS:
            # whoever has a key may look at pictures although the disk is full
            with contextlib.suppress(sqlite3.Error), self._store.transaction() as db:
                db.execute("UPDATE keys SET used_at = ? WHERE id = ?", [now, found["id"]])
        return str(found["id"])


class Limits:
    """What a key may ask for.

    Args:
        per_minute: requests, which may also come all at once (a token bucket).
        queue: tasks that may wait.
    """

    def __init__(self, *, per_minute: int, queue: int) -> None:
        self.queue = queue
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # by key: tokens left, and when
        self._lock = threading.Lock()

    def check(self, key_id: str) -> None:
        """Count a request; TooOften, uncounted, when the key has used up what it may."""
        now, a_second = time.monotonic(), self._per_minute / 60
        with self._lock:
            left, then = self._buckets.get(key_id, (self._per_minute, now))
            left = min(self._per_minute, left + (now - then) * a_second)
            if left < 1:
                raise TooOften(
                    f"This key may ask {self._per_minute} times a minute: try again later.",
                    retry_after=(1 - left) / a_second,
                )
            self._buckets[key_id] = (left - 1, now)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


def redact(text: str) -> str:
    """The text with our keys cut to their beginnings, and other credentials of Authorization headers out."""
    return _AUTHORIZATION.sub(r"\1***", _KEY.sub(r"\1***", text))


def redact_logs() -> None:
    """From now on no log record shows a key: message, arguments and traceback, of any logger."""
    make = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if isinstance(record.args, tuple):  # one by one: uvicorn's access log takes them apart again
            record.args = tuple(redact(item) if isinstance(item, str) else item for item in record.args)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: logging itself complains of them
            return record
        if (clean := redact(message)) != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(make_redacted)
