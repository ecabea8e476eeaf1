"""Webhooks: whoever gave a URL with a task is told how it ended, at least once, by one message id.

Messages come from the outbox in the store, where they are put in the transaction that ends the task, so a
restart loses none. Headers and signature are those of Standard Webhooks (standardwebhooks.com).
"""

import asyncio
import base64
import json
import logging
import random
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from standardwebhooks import Webhook

from uso.errors import InputError
from uso.serve.fetch import Fetcher
from uso.serve.store import Store, iso

logger = logging.getLogger(__name__)

# The hosted app's page counts otherwise than its clients; its numbers are spoken here.
NUMBERS = {"completed": 9, "failed": 10, "cancelled": 11}
DELAYS = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 18000.0, 36000.0)  # between tries: 19 hours in all
RETRY_AFTER_MAX = 24 * 3600.0
POLL_SECONDS = 0.3
AT_ONCE = 8  # deliveries on their way: a slow receiver does not hold up the others
SECRET_BYTES = range(24, 65)  # by the standard


def payload(task: Mapping[str, Any]) -> bytes:
    """What is sent, as JSON.

    Of `task` are read: id, state ("completed", "failed" or "cancelled"), output (None without), error (None
    without), session_id, and created_at and updated_at in seconds since 1970.
    """
    message = {
        "id": task["id"],
        "status": NUMBERS[task["state"]],
        "output": task["output"],
        "error": task["error"] or "",
        "session_id": task["session_id"],
        "created_at": iso(task["created_at"]),
        "updated_at": iso(task["updated_at"]),
    }
    return json.dumps(message).encode()


class Deliverer:
    """Sends what is due in the outbox, from a thread of its own.

    Args:
        store, fetcher: where messages are, and the guard through which they go.
        secret: "whsec_" and 24 to 64 bytes in base64, to sign with. InputError for another.
        delays: seconds before each further try, lengthened by up to a quarter; after the last one it is
            given up.
    """

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        *,
        secret: str | None = None,
        delays: Sequence[float] = DELAYS,
    ) -> None:
        self._store = store
        self._fetcher = fetcher
        self._webhook = Webhook(_secret_bytes(secret)) if secret else None
        self._delays = delays
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="uso-webhooks", daemon=True
        )

    def start(self) -> None:
        """Begin, with what an earlier process left."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; what is on its way is sent again by the next process."""
        self._stopped.set()
        self._thread.join(timeout=5)

    async def _run(self) -> None:
        flying: dict[str, asyncio.Task[None]] = {}
        while not self._stopped.is_set():
            flying = {id: task for id, task in flying.items() if not task.done()}
            for message in self._due():
                if message["id"] not in flying and len(flying) < AT_ONCE:
                    flying[message["id"]] = asyncio.create_task(self._deliver(message))
            await asyncio.sleep(POLL_SECONDS)

    def _due(self) -> list[sqlite3.Row]:
        try:
            return self._store.all(
                "SELECT * FROM outbox WHERE next_try_at <= ? ORDER BY next_try_at LIMIT ?",
                time.time(),
                AT_ONCE,
            )
        except sqlite3.Error:
            logger.exception("The outbox cannot be read")
            return []

    async def _deliver(self, message: sqlite3.Row) -> None:
        """One try, and what came of it into the outbox."""
        try:
            failure, wait = await self._send(message)
        except Exception as error:
            logger.exception("Webhook of task %s", message["task_id"])
            failure, wait = f"{type(error).__name__}: {error}", 0.0
        now, tries, next_try_at = time.time(), message["tries"] + 1, None
        if wait is not None and tries <= len(self._delays):
            delay = self._delays[tries - 1] * random.uniform(1, 1.25)
            next_try_at = now + max(delay, min(wait, RETRY_AFTER_MAX))
        if failure:
            then = "to be tried again" if next_try_at else "given up"
            logger.warning("Webhook of task %s %s: %s", message["task_id"], then, failure)
        try:
            with self._store.transaction() as db:
                db.execute(
                    "UPDATE outbox SET tries = ?, next_try_at = ?, delivered_at = ?, error = ? WHERE id = ?",
                    [tries, next_try_at, None if failure else now, failure, message["id"]],
                )
        except sqlite3.Error:
            logger.exception("The outbox cannot be written")
            await asyncio.sleep(DELAYS[1])  # it stays due: do not flood its receiver

    async def _send(self, message: sqlite3.Row) -> tuple[str | None, float | None]:
        """What went wrong, None for nothing; and the seconds to wait at least, None for no further try."""
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message["id"],
            "webhook-timestamp": str(int(now.timestamp())),
        }
        if self._webhook:
            headers["webhook-signature"] = self._webhook.sign(message["id"], now, message["body"].decode())
        try:
            status, answer = await self._fetcher.post(message["url"], message["body"], headers)
        except InputError as error:
            return str(error), 0.0
        if 200 <= status < 300:
            return None, None
        gone = status == 410
        return f"the receiver answered {status}", None if gone else _seconds(answer.get("retry-after", ""))


def _seconds(retry_after: str) -> float:
    """`Retry-After`, in seconds or a date (RFC 9110); 0 for none that can be read."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return 0.0


def _secret_bytes(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if len(key) not in SECRET_BYTES:
        raise InputError('The webhook secret must be "whsec_" and 24 to 64 bytes in base64.')
    return key
