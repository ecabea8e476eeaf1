"""What the environment and `.env` say: read once, here and nowhere else.

The official repository's names are taken as they are, so that its users change nothing; ours begin with
`USO_`.
"""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from uso.errors import InputError

# What the official `example.env` holds in place of a token; the hub would refuse it as a wrong one.
TOKEN_PLACEHOLDER = "your_huggingface_token_here"


class Settings(BaseSettings):
    """Where the weights lie and how to run; names in the environment are the alias or the field in capitals.

    Empty values count as unset. Raises pydantic's `ValidationError`, which `get_settings` makes an
    `InputError`.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", populate_by_name=True, frozen=True
    )

    flux_dev: Path | None = None
    flux_dev_fp8: Path | None = None
    flux_krea_dev: Path | None = None
    flux_schnell: Path | None = None
    ae: Path | None = None
    t5: Path | None = None
    clip: Path | None = None
    lora: Path | None = None
    projection_model: Path | None = None
    siglip_path: Path | None = None
    hf_token: SecretStr | None = None

    model: str = Field(default="nano", validation_alias="USO_MODEL", min_length=1)
    device: str = Field(
        default="auto", validation_alias="USO_DEVICE", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"
    )
    # no float16: T5 overflows in it
    dtype: Literal["auto", "bfloat16", "float32"] = Field(default="auto", validation_alias="USO_DTYPE")
    host: str = Field(default="127.0.0.1", validation_alias="USO_HOST", min_length=1)
    port: int = Field(default=7860, validation_alias="USO_PORT", ge=1, le=65535)
    # serving beyond this machine: a public link, USER:PASSWORD, and whether to do without a password
    share: bool = Field(default=False, validation_alias="USO_SHARE")
    auth: SecretStr | None = Field(default=None, validation_alias="USO_AUTH")
    no_password: bool = Field(default=False, validation_alias="USO_NO_PASSWORD")
    space_id: str | None = Field(default=None, validation_alias="SPACE_ID")  # set on a Hugging Face Space
    # the engine's: see `uso.serve.engine.Engine`
    memory: Literal["auto", "full", "staged", "offload"] = Field(
        default="auto", validation_alias="USO_MEMORY"
    )
    quantize: Literal["none", "int8", "int4"] = Field(default="none", validation_alias="USO_QUANTIZE")
    turbo: bool = Field(default=False, validation_alias="USO_TURBO")
    queue_limit: int = Field(default=32, validation_alias="USO_QUEUE_LIMIT", ge=1)
    step_limit: float = Field(default=600.0, validation_alias="USO_STEP_LIMIT", gt=0)
    max_attempts: int = Field(default=3, validation_alias="USO_MAX_ATTEMPTS", ge=1)
    # what lasts: database, uploads, pictures, keys; for how long, and how much of it
    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("uso"), validation_alias="USO_DATA_DIR"
    )
    keep_days: float = Field(default=7.0, validation_alias="USO_KEEP_DAYS", gt=0)
    quota_gb: float = Field(default=10.0, validation_alias="USO_QUOTA_GB", gt=0)
    # the API: None asks for keys whenever others than this machine can reach it
    require_keys: bool | None = Field(default=None, validation_alias="USO_REQUIRE_KEYS")
    key_rate: int = Field(default=600, validation_alias="USO_KEY_RATE", ge=1)  # requests a minute
    key_queue: int = Field(default=16, validation_alias="USO_KEY_QUEUE", ge=1)  # pictures that may wait
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), validation_alias="USO_CORS_ORIGINS"
    )
    # foreign URLs, of pictures and webhooks: see `uso.serve.fetch.Fetcher`
    foreign_urls: Literal["off", "allow-list", "public"] = Field(
        default="public", validation_alias="USO_FOREIGN_URLS"
    )
    foreign_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), validation_alias="USO_FOREIGN_HOSTS"
    )
    allow_loopback_urls: bool = Field(default=False, validation_alias="USO_ALLOW_LOOPBACK_URLS")
    webhook_secret: SecretStr | None = Field(default=None, validation_alias="USO_WEBHOOK_SECRET")

    @property
    def lossy(self) -> dict[str, Any]:
        """Those that change the picture, where they are not as usual; for its parameters."""
        usual = {"quantize": "none", "turbo": False}
        return {name: value for name in usual if (value := getattr(self, name)) != usual[name]}

    @field_validator("*", mode="before")
    @classmethod
    def _blank_is_unset(cls, value: Any, info: Any) -> Any:
        """Quotes around nothing and blanks reach us as text."""
        if isinstance(value, str) and not value.strip():
            return cls.model_fields[info.field_name].get_default(call_default_factory=True)
        return value.strip() if isinstance(value, str) else value

    @field_validator("cors_origins", "foreign_hosts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Names with commas or blanks between them."""
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("host")
    @classmethod
    def _as_in_urls(cls, host: str) -> str:
        """An IPv6 address in brackets."""
        return f"[{host}]" if ":" in host and not host.startswith("[") else host

    @field_validator("auth", mode="after")
    @classmethod
    def _auth_is_a_pair(cls, auth: SecretStr | None) -> SecretStr | None:
        if auth and not all(auth.get_secret_value().partition(":")):
            raise ValueError("must be USER:PASSWORD")
        return auth

    @field_validator("hf_token", mode="after")
    @classmethod
    def _placeholder_is_unset(cls, token: SecretStr | None) -> SecretStr | None:
        return None if token and token.get_secret_value() == TOKEN_PLACEHOLDER else token

    @field_validator(
        "flux_dev",
        "flux_dev_fp8",
        "flux_krea_dev",
        "flux_schnell",
        "ae",
        "t5",
        "clip",
        "lora",
        "projection_model",
        "siglip_path",
        "data_dir",
    )
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else None


def environment_name(field: str) -> str:
    """Name of a `Settings` field in the environment, for messages."""
    return str(Settings.model_fields[field].validation_alias or field.upper())


@lru_cache
def get_settings() -> Settings:
    """The settings of this process, read at the first call.

    Raises:
        InputError: names every variable with an unusable value, the value and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"{environment_name(name) if (name := str(e['loc'][0])) in Settings.model_fields else name}"
            f"={e['input']!r}: {e['msg']}"
            for e in error.errors(include_url=False)
        ]
        raise InputError(
            f"The environment or .env has unusable values: {'; '.join(problems)}. Correct or remove them."
        ) from None
