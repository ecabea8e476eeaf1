"""API keys: shown once, compared by hash, limited, and in no log."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from uso.cli import main
from uso.errors import InputError
from uso.serve.keys import SHOWN, Keys, Limits, TooOften, redact, redact_logs
from uso.serve.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def test_a_key_from_its_making_to_its_end(store: Store) -> None:
    keys = Keys(store)
    first, second = keys.create("laptop"), keys.create("phone")
    rows = {row["name"]: row for row in keys.all()}
    assert keys.verify(first) == rows["laptop"]["id"] != keys.verify(second)
    assert first.startswith(rows["laptop"]["prefix"])
    for wrong in (
        "",
        first[:-1],
        first + "A",
        first.swapcase(),
        rows["laptop"]["sha256"],
        "\udce9",
        "é" * 99,
    ):
        assert keys.verify(wrong) is None
    keys.revoke("laptop")
    assert keys.verify(first) is None
    assert keys.verify(second) == rows["phone"]["id"]
    assert keys.create("laptop") != first  # the name is free again
    used = {row["name"]: row["used_at"] for row in keys.all() if row["revoked_at"] is None}
    assert used["phone"]
    assert used["laptop"] is None


def test_the_key_is_not_in_the_database(store: Store, tmp_path: Path) -> None:
    key = Keys(store).create("laptop")
    assert len(key) >= 4 + 43  # 32 bytes in base64
    Keys(store).verify(key)
    store.close()
    for file in tmp_path.iterdir():
        assert key[SHOWN:].encode() not in file.read_bytes()


def test_names(store: Store) -> None:
    keys = Keys(store)
    keys.create("a.b_c@d-1")
    for name in ("", "-x", "a b", "a" * 65, "x\n", "../x", "é"):
        with pytest.raises(InputError, match="NAME"):
            keys.create(name)
    with pytest.raises(InputError, match="already"):
        keys.create("a.b_c@d-1")
    with pytest.raises(InputError, match="no key 'nobody'"):
        keys.revoke("nobody")


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    limits = Limits(per_minute=3, queue=5)
    for _ in range(3):
        limits.check("a")
    with pytest.raises(TooOften, match="3 times a minute") as error:
        limits.check("a")
    assert error.value.retry_after == pytest.approx(20)
    limits.check("b")  # another key's requests are its own
    now += error.value.retry_after
    limits.check("a")
    with pytest.raises(TooOften):
        limits.check("a")
    now += 3600
    for _ in range(3):
        limits.check("a")
    with pytest.raises(TooOften):
        limits.check("a")


SECRET = "uso_AbCdEf" + "x-_9" * 9


@pytest.mark.parametrize(
    "text",
    [
        f"GET /tasks?key={SECRET} HTTP/1.1",
        f"Authorization: Bearer {SECRET}",
        f"headers {{'authorization': 'Bearer {SECRET}', 'accept': '*/*'}}",
        f"[(b'authorization', b'Bearer {SECRET}')]",
        f"authorization: {SECRET}",
    ],
)
def test_redaction(text: str) -> None:
    assert "x-_9" not in redact(text)
    foreign = text.replace(SECRET, "inf_another-service-s.key")
    if "uthorization" in text:
        assert "another" not in redact(foreign)
    assert redact("nothing of uso_nano or an author") == "nothing of uso_nano or an author"


def test_logs_show_no_key(caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    redact_logs()
    try:
        logger = logging.getLogger("some.library")
        logger.warning(f"in the text {SECRET}")
        logger.warning("as an argument: %s", SECRET)
        logger.warning("in an object: %s", {"authorization": f"Bearer {SECRET}"})
        logger.warning("as a mapping: %(key)s", {"key": SECRET})
        try:
            raise ValueError(f"it was {SECRET}")
        except ValueError:
            logger.exception("in a traceback")
        logger.warning("untouched %s %d", "words", 3)
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.text.count("uso_AbCdEf***") == 4  # all of it is left out in a header
    assert "x-_9" not in caplog.text
    assert "untouched words 3" in caplog.text


def test_the_command(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USO_DATA_DIR", str(clean_environment / "data"))
    assert main(["keys", "create", "laptop"]) == 0
    key = capsys.readouterr().out.splitlines()[-1]
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith(key[:SHOWN])
    assert "laptop" in listed
    assert "never used" in listed
    assert key not in listed
    assert main(["keys", "create", "laptop"]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["keys", "revoke", "laptop"]) == 0
    assert main(["keys", "revoke", "laptop"]) == 2
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    assert "revoked" in capsys.readouterr().out
    store = Store(clean_environment / "data")
    assert Keys(store).verify(key) is None
    store.close()
