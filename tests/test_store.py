"""What was stored is there afterwards, whole; and what is past its time is not."""

import os
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.test_engine import FakePipeline
from uso.errors import ImageError, InputError, USOError
from uso.images import MAX_BYTES
from uso.schema import parse_request
from uso.serve.engine import Engine
from uso.serve.files import ORPHAN_SECONDS, Files
from uso.serve.store import Store, iso

SESSION = (
    "INSERT INTO sessions (id, owner, created_at, updated_at, expires_at, idle_timeout)"
    " VALUES (?, '', 0, 0, 0, 1)"
)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(Store(tmp_path / "data"))


def png(path: Path) -> bytes:
    Image.new("RGB", (32, 24)).save(path / "picture.png")
    return (path / "picture.png").read_bytes()


def test_a_commit_waits_for_the_disk_and_nobody_else_reads_the_folder(files: Files) -> None:
    pragmas = [files.store.one(f"PRAGMA {name}") for name in ("journal_mode", "synchronous")]
    assert [row and row[0] for row in pragmas] == ["wal", 2]
    for folder in (files.store.folder, files.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in files.store.folder.glob("uso.db*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_all_or_nothing(files: Files) -> None:
    def twice() -> None:
        with files.store.transaction() as db:
            db.execute(SESSION, ("one",))
            db.execute(SESSION, ("one",))

    with pytest.raises(sqlite3.IntegrityError):
        twice()
    assert files.store.all("SELECT id FROM sessions") == []
    with files.store.transaction() as db:
        db.execute(SESSION, ("one",))
    files.store.close()
    assert [row["id"] for row in Store(files.store.folder).all("SELECT id FROM sessions")] == ["one"]


def test_many_threads_and_a_second_process_may_write(files: Files) -> None:
    other = Store(files.store.folder)

    def write(store: Store, name: str) -> None:
        for number in range(20):
            with store.transaction() as db:
                db.execute(SESSION, (f"{name}{number}",))

    threads = [threading.Thread(target=write, args=(files.store, f"a{n}-")) for n in range(4)]
    threads += [threading.Thread(target=write, args=(other, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files.store.all("SELECT id FROM sessions")) == 100


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(USOError, match="set USO_DATA_DIR"):
        Store(tmp_path / "file")
    store = Store(tmp_path / "data")
    with store.transaction() as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(USOError, match="another version"):
        Store(tmp_path / "data")


def test_times_are_utc() -> None:
    assert iso(1705314600.25) == "2024-01-15T10:30:00.250Z"


def test_a_file_is_there_whole_or_not_at_all(files: Files) -> None:
    def broken_off() -> None:
        with files.writing("uso-x.png") as target:
            target.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_off()
    assert list(files.folder.iterdir()) == []
    with files.writing("uso-x.png") as target:
        target.write(b"whole")
        assert not files.path("uso-x.png").exists()
    assert files.path("uso-x.png").read_bytes() == b"whole"


def test_a_picture_is_found_by_its_url_whatever_we_are_called(files: Files, tmp_path: Path) -> None:
    picture = files.keep_picture(png(tmp_path), field="style_image", owner="me")
    assert (picture.width, picture.height, picture.file.content_type) == (32, 24, "image/png")
    assert files.by_uri(picture.file.uri("http://127.0.0.1:7860")) == picture.file
    assert files.by_uri(picture.file.uri("https://elsewhere.example")) == picture.file
    for guess in ("guess", "", "\xe4", "\ud800"):
        assert files.find(picture.file.id, guess) is None
    assert files.by_uri(f"http://here/files/guess/{picture.file.id}") is None
    assert files.by_uri("http://here/files/\ud800/\ud800") is None
    with pytest.raises(ImageError, match="`style_image` is not a PNG"):
        files.keep_picture(b"%PDF-1.7", field="style_image", owner="me")


@pytest.mark.parametrize(
    ("filename", "end"),
    [("fox.JPG", ".jpg"), ("../../etc/passwd", ""), ("a.png/../x", ""), ("x.\0png", ""), ("\ud83e", "")],
)
def test_names_of_files_are_ours(files: Files, filename: str, end: str) -> None:
    file_id = files.new_id(filename)
    assert file_id.isascii()
    assert "/" not in file_id
    assert len(file_id) == len("uso-") + 16 + len(end)
    assert file_id.endswith(end)


def test_an_upload_is_announced_and_comes_once(files: Files) -> None:
    file, path, secret = files.announce(
        owner="me", filename="fox.jpg", content_type="image/jpeg", path="in/fox", size=3
    )
    assert files.awaited(file.id, secret)
    assert not files.awaited(file.id, file.secret), "who may read may not write"
    assert files.find(file.id, file.secret) is None, "not there yet"
    assert files.by_path(path, owner="me") is None
    with files.writing(file.id) as target:
        target.write(b"fox")
    files.arrived(file.id, size=3, sha256="ab")
    assert not files.awaited(file.id, secret)
    found = files.find(file.id, file.secret)
    assert found == files.by_path("in/fox", owner="me")
    assert found is not None
    assert (found.size, found.sha256) == (3, "ab")
    assert files.by_path("in/fox", owner="somebody") is None
    file, _, secret = files.announce(owner="me", filename="", content_type="", path=None, size=None)
    with files.store.transaction() as db:
        db.execute("UPDATE files SET upload_until = ? WHERE id = ?", (time.time() - 1, file.id))
    assert not files.awaited(file.id, secret), "too late"
    with pytest.raises(InputError, match="limit of 50 MiB"):
        files.announce(owner="", filename="", content_type="", path=None, size=MAX_BYTES + 1)


def test_what_is_past_its_time_goes_and_what_a_task_needs_stays(files: Files, tmp_path: Path) -> None:
    engine = Engine(lambda progress: FakePipeline(), model="fake", files=files)
    needed, idle = (files.keep_picture(png(tmp_path), field="style_image", owner="") for _ in range(2))
    waiting = engine.submit(parse_request({"prompt": ""}), {"style_image": needed})
    ended = engine.submit(parse_request({"prompt": ""}), {})
    engine.cancel(ended.id)
    file, _, _ = files.announce(owner="", filename="", content_type="", path=None, size=1)
    for name in ("left-behind", "just-made"):
        (files.folder / name).write_bytes(b"")
    with files.store.transaction() as db:
        db.execute(SESSION, ("old",))
        for table in ("files", "tasks"):
            db.execute(f"UPDATE {table} SET created_at = 1")
        db.execute("UPDATE tasks SET updated_at = 1")
        db.execute("UPDATE files SET created_at = ?, upload_until = 1 WHERE id = ?", (time.time(), file.id))
    old = time.time() - ORPHAN_SECONDS - 1
    os.utime(files.folder / "left-behind", (old, old))
    files.sweep()
    assert [row["id"] for row in files.store.all("SELECT id FROM files")] == [needed.file.id]
    assert [row["id"] for row in files.store.all("SELECT id FROM tasks")] == [waiting.id]
    assert files.store.all("SELECT id FROM sessions") == []
    assert {path.name for path in files.folder.iterdir()} == {needed.file.id, "just-made"}
    assert not files.path(idle.file.id).exists()


def test_what_is_being_written_does_not_stop_the_sweep(files: Files) -> None:
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            files.write(b"x", filename="", content_type="")

    writers = [threading.Thread(target=write) for _ in range(3)]
    for thread in writers:
        thread.start()
    try:
        for _ in range(100):
            files.sweep()
    finally:
        done.set()
        for thread in writers:
            thread.join()


def test_the_oldest_make_room_for_the_new(files: Files, tmp_path: Path) -> None:
    data = png(tmp_path)
    files.quota = 3 * len(data)
    kept = []
    for number in range(5):
        picture = files.keep_picture(data, field="style_image", owner="")
        with files.store.transaction() as db:
            db.execute("UPDATE files SET created_at = ? WHERE id = ?", (number, picture.file.id))
        kept.append(picture.file.id)
    assert {path.name for path in files.folder.iterdir()} == set(kept[-3:])
