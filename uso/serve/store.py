"""What lasts: tasks, files, sessions, webhooks to deliver and keys, in one SQLite database.

A transaction is on the disk when it ends (write-ahead log, `synchronous=FULL`), so whoever is answered
afterwards is answered the truth, whatever happens to the process. Times are seconds since 1970.
"""

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from uso.errors import USOError

VERSION = 1
TABLES = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    prefix TEXT NOT NULL,            -- the key's first characters, to tell keys apart
    sha256 TEXT NOT NULL UNIQUE,     -- of the whole key, hexadecimal
    created_at REAL NOT NULL,
    used_at REAL,
    revoked_at REAL
);
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    ended_at REAL,
    idle_timeout INTEGER NOT NULL,   -- seconds
    call_count INTEGER NOT NULL DEFAULT 0,
    task_id TEXT                     -- the newest
);
CREATE TABLE tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,             -- "key:<id>", "page:<hash>" or "" where nobody is asked for a key
    batch TEXT,                      -- of the page: tasks of one click
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
    stop TEXT CHECK (stop IN ('cancel', 'keep')),
    attempts INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,           -- JSON, the fields that were given
    pictures TEXT NOT NULL,          -- JSON, by field, see files.Picture
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    seed INTEGER NOT NULL,
    notes TEXT NOT NULL DEFAULT '[]',
    logs TEXT NOT NULL DEFAULT '[]',
    result TEXT,                     -- JSON, see engine.Result
    error TEXT,
    session_id TEXT,
    webhook TEXT,
    base_url TEXT NOT NULL DEFAULT '',  -- under which the client knows us, without a slash at its end
    legacy INTEGER NOT NULL DEFAULT 0,  -- made through POST /run: speaks the old status numbers
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL
);
CREATE INDEX tasks_open ON tasks (number) WHERE state IN ('queued', 'running');
CREATE INDEX tasks_owner ON tasks (owner, number);
CREATE INDEX tasks_updated ON tasks (updated_at);
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    secret TEXT NOT NULL,            -- in the URL to read it
    upload_secret TEXT,              -- in the URL to write it, once, until `upload_until`
    upload_until REAL,
    path TEXT,                       -- the client's own name for it
    filename TEXT NOT NULL,
    content_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    sha256 TEXT NOT NULL,            -- empty until its bytes are there
    created_at REAL NOT NULL
);
CREATE INDEX files_created ON files (created_at);
CREATE INDEX files_path ON files (owner, path);
CREATE TABLE task_files (
    task_id TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    file_id TEXT NOT NULL,           -- of a file that may have been deleted since
    role TEXT NOT NULL CHECK (role IN ('input', 'output')),
    PRIMARY KEY (task_id, file_id, role)
) WITHOUT ROWID;
CREATE INDEX task_files_file ON task_files (file_id);
CREATE TABLE idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    sha256 TEXT NOT NULL,            -- of the request
    task_id TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE TABLE outbox (                -- webhooks: one row for each task that asked for one and has ended
    id TEXT PRIMARY KEY,             -- the message's, the same for all tries
    task_id TEXT NOT NULL UNIQUE,
    url TEXT NOT NULL,
    body BLOB NOT NULL,
    created_at REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    next_try_at REAL,                -- null when nothing is left to do
    delivered_at REAL,
    error TEXT                       -- of the last try
);
CREATE INDEX outbox_due ON outbox (next_try_at) WHERE next_try_at IS NOT NULL;
"""


class Store:
    """The database in a folder, for any number of threads.

    One connection, one statement or transaction at a time: a commit waits for the disk, so the event loop
    must not call this itself. Another process (the command line) may work on the same file.

    Raises:
        USOError: the folder cannot be used, or the database is of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "uso.db").touch(mode=0o600)  # the folder may be older, and open to all
            self._connection = sqlite3.connect(
                folder / "uso.db", timeout=30, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            with self.transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in TABLES.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise USOError(f"The data folder {folder} cannot be used ({error}): set USO_DATA_DIR.") from error
        if version not in (0, VERSION):
            raise USOError(
                f"{folder} was written by another version of uso: set USO_DATA_DIR to a new folder."
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; on the disk when the block ends. Not to be nested."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        with self._lock:
            row: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
            return row

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def iso(seconds: float) -> str:
    """A time as the API writes it: ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_full(error: Exception) -> bool:
    """Whether an error of the system or of SQLite says that the disk is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
