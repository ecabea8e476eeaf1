from pathlib import Path

import pytest
from pydantic import ValidationError

from uso.errors import InputError
from uso.settings import TOKEN_PLACEHOLDER, Settings, environment_name, get_settings

OFFICIAL_NAMES = [
    "FLUX_DEV",
    "FLUX_DEV_FP8",
    "FLUX_KREA_DEV",
    "FLUX_SCHNELL",
    "AE",
    "T5",
    "CLIP",
    "LORA",
    "PROJECTION_MODEL",
    "SIGLIP_PATH",
]
OUR_NAMES = [
    "USO_MODEL",
    "USO_DEVICE",
    "USO_DTYPE",
    "USO_HOST",
    "USO_PORT",
    "USO_SHARE",
    "USO_AUTH",
    "USO_NO_PASSWORD",
    "USO_MEMORY",
    "USO_QUANTIZE",
    "USO_TURBO",
    "USO_QUEUE_LIMIT",
    "USO_STEP_LIMIT",
    "USO_MAX_ATTEMPTS",
    "USO_DATA_DIR",
    "USO_KEEP_DAYS",
    "USO_QUOTA_GB",
    "USO_REQUIRE_KEYS",
    "USO_KEY_RATE",
    "USO_KEY_QUEUE",
    "USO_CORS_ORIGINS",
    "USO_FOREIGN_URLS",
    "USO_FOREIGN_HOSTS",
    "USO_ALLOW_LOOPBACK_URLS",
    "USO_WEBHOOK_SECRET",
    "SPACE_ID",
]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*OFFICIAL_NAMES, "HF_TOKEN", *OUR_NAMES]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()


def test_names_in_the_environment_are_the_official_ones_and_ours() -> None:
    assert {environment_name(field) for field in Settings.model_fields} == {
        *OFFICIAL_NAMES,
        "HF_TOKEN",
        *OUR_NAMES,
    }


def test_without_any_setting_nano_runs_on_what_is_there() -> None:
    settings = Settings()
    assert (settings.model, settings.device, settings.dtype) == ("nano", "auto", "auto")
    assert settings.flux_dev is None
    assert settings.hf_token is None


@pytest.mark.parametrize("name", OFFICIAL_NAMES)
def test_official_names_are_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "~/weights/x.safetensors")
    assert getattr(Settings(), name.lower()) == Path.home() / "weights/x.safetensors"


def test_env_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("FLUX_DEV=./a.safetensors\nUSO_MODEL=flux-dev\nUSO_PORT=8000\nOTHER=1\n")
    monkeypatch.setenv("USO_PORT", "9000")
    settings = Settings()
    assert (settings.flux_dev, settings.model, settings.port) == (Path("a.safetensors"), "flux-dev", 9000)


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_values_count_as_unset(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*OFFICIAL_NAMES, "HF_TOKEN", *OUR_NAMES]:
        monkeypatch.setenv(name, empty)
    assert Settings() == Settings.model_construct()


def test_the_examples_placeholder_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN_PLACEHOLDER)
    assert Settings().hf_token is None


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    settings = get_settings()
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in f"{settings} {settings!r} {settings.model_dump_json()}"


def test_bad_values_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USO_PORT", "99999")
    monkeypatch.setenv("USO_DEVICE", "gpu")
    monkeypatch.setenv("USO_DTYPE", "float16")
    with pytest.raises(InputError) as error:
        get_settings()
    for part in ("USO_PORT='99999'", "65535", "USO_DEVICE='gpu'", "cuda", "USO_DTYPE='float16'", "bfloat16"):
        assert part in str(error.value)


def test_settings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("USO_MODEL", "flux-dev")
    assert get_settings() is first


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().model = "flux-dev"
