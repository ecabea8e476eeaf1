"""Files on the disk: what clients upload, what tasks read and what they made, each with its row in the store.

A file appears complete or not at all, and its row after it. Its name is its id; its URL holds a secret, so
whoever has the URL may read it, for as long as it is kept.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from PIL import Image

from uso.errors import ImageError, InputError
from uso.images import MAX_BYTES, open_image
from uso.serve.store import Store

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 3600.0  # within which an announced upload must arrive
ORPHAN_SECONDS = 3600.0  # after which a file without a row counts as left behind by a crash
IDEMPOTENCY_SECONDS = 24 * 3600.0
# Ids of files that a task which has not ended needs
IN_USE = """SELECT file_id FROM task_files JOIN tasks ON tasks.id = task_id
    WHERE role = 'input' AND state IN ('queued', 'running')"""


@dataclass(frozen=True)
class StoredFile:
    """A file as its row has it; `size` in bytes, `sha256` in hexadecimal, empty until its bytes are there."""

    id: str
    secret: str
    filename: str
    content_type: str
    size: int
    sha256: str

    @classmethod
    def of(cls, row: sqlite3.Row) -> "StoredFile":
        return cls(*(row[name] for name in cls.__dataclass_fields__))

    def uri(self, base_url: str) -> str:
        return f"{base_url}/files/{self.secret}/{self.id}"

    def described(self, base_url: str) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "uri": self.uri(base_url),
            "content_type": self.content_type,
            "size": self.size,
            "filename": self.filename,
        }


@dataclass(frozen=True)
class Picture:
    """A stored file that was found to be a picture; its size upright, in pixels."""

    file: StoredFile
    width: int
    height: int

    @classmethod
    def of(cls, data: dict[str, Any]) -> "Picture":
        """Back from `dataclasses.asdict`."""
        return cls(**data | {"file": StoredFile(**data["file"])})


class Files:
    """The files of a store, below its folder.

    Args:
        keep_seconds: how long files, and tasks that have ended, are kept.
        quota: bytes of all files; the oldest that no waiting task needs go first.
    """

    def __init__(self, store: Store, *, keep_seconds: float = 7 * 86400.0, quota: int = 10 * 2**30) -> None:
        self.store = store
        self.keep_seconds = keep_seconds
        self.quota = quota
        self.folder = store.folder / "files"
        self.folder.mkdir(exist_ok=True, mode=0o700)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a known id lie."""
        return self.folder / file_id

    # Writing

    def new_id(self, filename: str) -> str:
        """A fresh id that keeps the name's extension, for programs that go by it."""
        suffix = Path(filename).suffix.lower()
        return (
            "uso-" + secrets.token_urlsafe(12) + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else "")
        )

    @contextlib.contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        """A file to fill; it is there, and on the disk, when the block ends without an error."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".part-", delete=False) as file:
            try:
                yield file  # type: ignore[misc]
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, self.path(file_id))
        if os.name == "posix":
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too
            finally:
                os.close(folder)

    def write(self, data: bytes, *, filename: str, content_type: str) -> StoredFile:
        """Put bytes on the disk, without their row: see `insert`."""
        self.make_room(len(data))
        digest = hashlib.sha256(data).hexdigest()
        file = StoredFile(self.new_id(filename), _secret(), filename, content_type, len(data), digest)
        with self.writing(file.id) as target:
            target.write(data)
        return file

    @staticmethod
    def insert(db: sqlite3.Connection, file: StoredFile, *, owner: str) -> None:
        """The row of a file that was written, within a transaction."""
        values = {**asdict(file), "owner": owner, "created_at": time.time()}
        marks = ", ".join(f":{name}" for name in values)
        db.execute(f"INSERT INTO files ({', '.join(values)}) VALUES ({marks})", values)

    def keep_picture(
        self, data: bytes, *, field: str, owner: str, filename: str = "", content_type: str = ""
    ) -> Picture:
        """Check that the bytes are a picture and store them; ImageError, naming the field, when not."""
        with open_image(data, field=field) as image:
            size = image.size
        file = self.write(data, filename=filename or field, content_type=content_type or _picture_type(data))
        with self.store.transaction() as db:
            self.insert(db, file, owner=owner)
        return Picture(file, *size)

    # Uploads in two steps

    def announce(
        self, *, owner: str, filename: str, content_type: str, path: str | None, size: int | None
    ) -> tuple[StoredFile, str, str]:
        """A file that will be uploaded; returns it, its path and the secret for its upload."""
        if (size or 0) > MAX_BYTES:
            raise InputError(
                f"`files`: {size} bytes are above the limit of {MAX_BYTES // 2**20} MiB.", field="files"
            )
        file = StoredFile(self.new_id(filename), _secret(), filename, content_type, size or 0, "")
        now = time.time()
        path, upload_secret = path or f"{file.id}/{filename}", _secret()
        with self.store.transaction() as db:
            self.insert(db, file, owner=owner)
            db.execute(
                "UPDATE files SET upload_secret = ?, upload_until = ?, path = ? WHERE id = ?",
                (upload_secret, now + UPLOAD_SECONDS, path, file.id),
            )
        return file, path, upload_secret

    def awaited(self, file_id: str, upload_secret: str) -> bool:
        """Whether this upload was announced, is in time and has not come yet."""
        row = self.store.one(
            "SELECT upload_secret FROM files WHERE id = ? AND sha256 = '' AND upload_until > ?",
            file_id,
            time.time(),
        )
        return row is not None and _same(row["upload_secret"], upload_secret)

    def arrived(self, file_id: str, *, size: int, sha256: str) -> None:
        """An upload's bytes are on the disk."""
        self.make_room(size)
        with self.store.transaction() as db:
            db.execute("UPDATE files SET size = ?, sha256 = ? WHERE id = ?", (size, sha256, file_id))

    # Reading

    def find(self, file_id: str, secret: str) -> StoredFile | None:
        """The file of a URL, if its bytes are there."""
        row = self.store.one("SELECT * FROM files WHERE id = ? AND sha256 != ''", file_id)
        if row is None or not _same(row["secret"], secret):
            return None
        return StoredFile.of(row)

    def by_uri(self, uri: str) -> StoredFile | None:
        """The file of a URL of ours, under whatever name the server was called; None for any other URL."""
        match urlsplit(uri).path.split("/")[1:] if uri.startswith(("http://", "https://")) else ():
            case ["files", secret, file_id] if file_id.isascii():
                return self.find(file_id, secret)
        return None

    def by_path(self, path: str, *, owner: str) -> StoredFile | None:
        """The owner's newest upload of that path."""
        row = self.store.one(
            "SELECT * FROM files WHERE owner = ? AND path = ? AND sha256 != ''"
            " ORDER BY created_at DESC LIMIT 1",
            owner,
            path,
        )
        return StoredFile.of(row) if row else None

    def picture(self, file: StoredFile, *, field: str) -> Picture:
        """A stored file as a picture; ImageError, naming the field, when it is none."""
        with open_image(self.path(file.id), field=field) as image:
            return Picture(file, *image.size)

    def open(self, picture: Picture, *, field: str) -> Image.Image:
        """The picture for the model, as `images.open_image` makes it."""
        path = self.path(picture.file.id)
        if not path.exists():
            raise ImageError(f"`{field}` is not on the server any more: give the picture again.", field=field)
        return open_image(path, field=field)

    # Deleting

    def delete(self, file_id: str) -> bool:
        """False when a task that has not ended needs the file; it is kept then."""
        with self.store.transaction() as db:
            db.execute(f"DELETE FROM files WHERE id = ? AND id NOT IN ({IN_USE})", (file_id,))
            if db.execute("SELECT 1 FROM files WHERE id = ?", (file_id,)).fetchone():
                return False
        self.path(file_id).unlink(missing_ok=True)
        return True

    def make_room(self, size: int) -> None:
        """Delete the oldest files, as far as no waiting task needs them, until `size` bytes fit the quota."""
        row = self.store.one("SELECT COALESCE(SUM(size), 0) AS used FROM files WHERE sha256 != ''")
        excess = (row["used"] if row else 0) + size - self.quota
        if excess <= 0:
            return
        oldest = self.store.all(
            f"SELECT id, size FROM files WHERE sha256 != '' AND id NOT IN ({IN_USE}) ORDER BY created_at"
        )
        for old in oldest:
            if excess > 0 and self.delete(old["id"]):
                excess -= old["size"]

    def sweep(self) -> None:
        """Delete what is past its time: files, tasks that ended, sessions; and what a crash left behind."""
        now = time.time()
        expired = now - self.keep_seconds
        rows = self.store.all(
            "SELECT id FROM files WHERE created_at < ? OR (sha256 = '' AND upload_until < ?)", expired, now
        )
        for row in rows:
            self.delete(row["id"])
        with self.store.transaction() as db:
            db.execute(
                "DELETE FROM tasks WHERE updated_at < ? AND state NOT IN ('queued', 'running')", (expired,)
            )
            db.execute("DELETE FROM sessions WHERE expires_at < ?", (expired,))
            db.execute("DELETE FROM outbox WHERE created_at < ? AND next_try_at IS NULL", (expired,))
            db.execute("DELETE FROM idempotency WHERE created_at < ?", (now - IDEMPOTENCY_SECONDS,))
        self.make_room(0)
        known = {row["id"] for row in self.store.all("SELECT id FROM files")}
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # one that is just being written gets its name
                if path.name not in known and path.stat().st_mtime < now - ORPHAN_SECONDS:
                    path.unlink()
                    logger.info("Removed %s, which no task knows", path.name)


def _secret() -> str:
    return secrets.token_urlsafe(24)


def _same(secret: str, guess: str) -> bool:
    return secrets.compare_digest(secret.encode(), guess.encode("utf-8", "surrogatepass"))


def _picture_type(data: bytes) -> str:
    """The media type of a picture that `open_image` took."""
    for start, kind in ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp")):
        if data.startswith(start):
            return f"image/{kind}"
    return "image/heif"
