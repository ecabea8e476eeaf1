"""One server a data folder; and what is done where there is none to be had."""

import logging
import socket
from pathlib import Path

import pytest

from uso.cli import _settings, build_parser, main
from uso.errors import USOError
from uso.serve import server
from uso.serve.server import asks_for_keys, data_store
from uso.settings import Settings


@pytest.fixture
def usual(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is taken when none is set."""
    folder = clean_environment / "usual"
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: folder)
    return folder


def test_a_second_server_has_a_folder_of_its_own(usual: Path, caplog: pytest.LogCaptureFixture) -> None:
    with data_store(Settings()) as first, data_store(Settings()) as second:
        assert first.folder == usual
        assert second.folder != usual
        assert second.all("SELECT id FROM tasks") == []
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert f"Another server uses {usual}: set USO_DATA_DIR" in warning.getMessage()
    assert not second.folder.exists()
    with data_store(Settings()) as third:
        assert third.folder == usual, "free again"


def test_a_usual_folder_that_cannot_be_written_is_done_without(
    usual: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual.write_text("a file")
    with data_store(Settings()) as store:
        assert store.folder != usual
    assert "cannot be used" in caplog.text


def test_a_folder_that_was_set_must_be_had(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USO_DATA_DIR", str(tmp_path / "mine"))
    with data_store(Settings()), pytest.raises(USOError, match="Another server"):  # noqa: SIM117
        with data_store(Settings()):
            pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("USO_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(USOError, match="cannot be used"), data_store(Settings()):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Gradio leaves its probe open
def test_a_port_that_is_taken_is_named(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "redact_logs", lambda: None)  # for the rest of the tests
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("USO_DATA_DIR", str(clean_environment))
        assert main(["serve", "--port", port]) == 2
    assert f"127.0.0.1:{port}: is the port taken? Give another --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "asks"),
    [
        ("", False),
        ("--host ::1", False),
        ("--host 0.0.0.0", True),
        ("--share", True),
        ("--auth me:secret", True),
        ("--require-keys", True),
        ("--host 0.0.0.0 --no-require-keys", False),
    ],
)
def test_keys_are_asked_for_where_strangers_come(clean_environment: Path, flags: str, asks: bool) -> None:
    settings = _settings(build_parser().parse_args(["serve", *flags.split()]))
    assert asks_for_keys(settings) == asks


def test_loopback_urls_are_read_only_when_it_is_said(clean_environment: Path) -> None:
    assert not _settings(build_parser().parse_args(["serve"])).allow_loopback_urls
    assert _settings(build_parser().parse_args(["serve", "--allow-loopback-urls"])).allow_loopback_urls
