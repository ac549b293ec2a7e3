"""The settings: environment variables or ``.env``, each explained in ``.env.example``.

An unknown ``WALSHIP_*`` name is an error, so that a misspelled setting is noticed at once and not at restore.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from infra.dotfile import read_dotfile
from pipeline.errors import ConfigError
from pipeline.policy import Policy, make_policy, parse_window

Cipher = Literal["aes-256-gcm", "chacha20-poly1305", "aes-256-cbc", "aes-192-cbc", "aes-128-cbc"]
Codec = Literal["zstd", "lz4", "gzip", "none"]

#: Settings that may be given as ``<NAME>_FILE`` instead: a file that holds the value (Docker and Kubernetes secrets).
SECRETS = ("POSTGRES_PASSWORD", "BACKUP_ENCRYPTION_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

_ENV_FILE = Path(".env")
_EXPLAINED = "each setting is explained in .env.example (of a wheel: share/walship/env.example)"


def _env(name: str, **more: Any) -> Any:
    return Field(validation_alias=AliasChoices(name), **more)


class Settings(BaseSettings):
    """All that a user can set. Names on the right are the environment's."""

    # Without .env, which ``load`` reads: pydantic would replace ${…} in a passphrase, and pass over broken lines.
    model_config = SettingsConfigDict(extra="ignore", case_sensitive=True, env_ignore_empty=True)

    #: One server, or several separated by commas: the primary is looked for among them.
    postgres_host: str = _env("POSTGRES_HOST", default="localhost")
    #: One port for all of them, or one for each. See ``servers``.
    postgres_port: str = _env("POSTGRES_PORT", default="5432")
    postgres_username: str = _env("POSTGRES_USERNAME", default="postgres")
    postgres_password: SecretStr = _env("POSTGRES_PASSWORD", default=SecretStr(""))
    postgres_connection_mode: Literal["docker", "host"] = _env("POSTGRES_CONNECTION_MODE", default="host")

    backup_encryption_enabled: bool = _env("BACKUP_ENCRYPTION_ENABLED", default=False)
    backup_encryption_algorithm: Cipher = _env("BACKUP_ENCRYPTION_ALGORITHM", default="aes-256-gcm")
    backup_encryption_password: SecretStr = _env("BACKUP_ENCRYPTION_PASSWORD", default=SecretStr(""))
    #: File with a recipient's private key, which opens the key ring as a passphrase does.
    identity_file: Path | None = _env("WALSHIP_IDENTITY_FILE", default=None)
    #: File with what a host needs that writes and does not read; counts only where nothing is set that reads.
    writer_file: Path | None = _env("WALSHIP_WRITER_FILE", default=None)
    #: None follows ``backup_encryption_enabled``.
    wal_encryption_enabled: bool | None = _env("WAL_ENCRYPTION_ENABLED", default=None)

    aws_access_key_id: SecretStr = _env("AWS_ACCESS_KEY_ID", default=SecretStr(""))
    aws_secret_access_key: SecretStr = _env("AWS_SECRET_ACCESS_KEY", default=SecretStr(""))

    destinations: Annotated[tuple[str, ...], NoDecode] = _env("WALSHIP_DESTINATIONS", default=())
    #: As given; empty means all. See ``required_urls``.
    required: Annotated[tuple[str, ...], NoDecode] = _env("WALSHIP_REQUIRED", default=())
    sources: Annotated[tuple[str, ...], NoDecode] = _env("WALSHIP_SOURCES", default=("watch",))
    spool_dir: Path | None = _env("WALSHIP_SPOOL_DIR", default=None)
    #: Replication slot of the stream, and the name under which it connects (``synchronous_standby_names``).
    slot: str = _env("WALSHIP_SLOT", default="walship", pattern="^[a-z0-9_]{1,63}$")
    #: Seconds that bytes of the open segment may wait until they are shipped as a tail.
    tail_interval: float = _env("WALSHIP_TAIL_INTERVAL", default=1.0, ge=0.1, le=3600)
    #: Seconds after which commits no longer wait for a required destination that does not answer; None: for ever.
    sync_timeout: float | None = _env("WALSHIP_SYNC_TIMEOUT", default=None, gt=0)
    #: Where /metrics is served, host:port; ``off``: nowhere. See ``listens``.
    listen: str = _env("WALSHIP_LISTEN", default="127.0.0.1:9432")
    #: Seconds between listings of each destination for the metrics.
    survey_interval: float = _env("WALSHIP_SURVEY_INTERVAL", default=300.0, ge=1, le=86400)
    #: What 1,000 PUT requests cost, for the estimate of what tails cost.
    put_price: float = _env("WALSHIP_PUT_PRICE", default=0.005, ge=0)
    compression: Codec = _env("WALSHIP_COMPRESSION", default="zstd")
    compression_level: int | None = _env("WALSHIP_COMPRESSION_LEVEL", default=None)
    #: Threads that compress and encrypt.
    workers: int = _env("WALSHIP_WORKERS", default=2, ge=1, le=64)
    #: The server's data directory as walship sees it: base backups then read the files themselves. Empty: through the
    #: server.
    data_dir: Path | None = _env("WALSHIP_DATA_DIR", default=None)
    #: A standby that base backups are taken from: host, or host:port. Empty: the server itself.
    backup_host: str = _env("WALSHIP_BACKUP_HOST", default="")
    #: Most bytes that a base backup takes from the server in a second; 0: as many as it gives.
    backup_rate: int = _env("WALSHIP_BACKUP_RATE", default=0, ge=0)
    #: How long ``walship verify`` trusts what it has read; 0: it reads everything, always. See ``verify_span``.
    verify_interval: str = _env("WALSHIP_VERIFY_INTERVAL", default="30d")
    #: Most bytes that it reads in a second; 0: as many as it gets.
    verify_rate: int = _env("WALSHIP_VERIFY_RATE", default=0, ge=0)
    #: The time zone of schedules and of what counts as a day. Cron expressions: see ``infra.cron``; empty: never.
    time_zone: str = _env("WALSHIP_TIME_ZONE", default="UTC")
    schedule_full: str = _env("WALSHIP_SCHEDULE_FULL", default="")
    schedule_incremental: str = _env("WALSHIP_SCHEDULE_INCREMENTAL", default="")
    schedule_expire: str = _env("WALSHIP_SCHEDULE_EXPIRE", default="")
    schedule_verify: str = _env("WALSHIP_SCHEDULE_VERIFY", default="")
    schedule_drill: str = _env("WALSHIP_SCHEDULE_DRILL", default="")
    #: For scheduled drills: a file of checks, and the folder of the reports; empty: none are kept.
    drill_checks: Path | None = _env("WALSHIP_DRILL_CHECKS", default=None)
    drill_reports: Path | None = _env("WALSHIP_DRILL_REPORTS", default=None)
    #: What ``walship expire`` keeps, each as it was typed; empty: no such rule. See ``retention``.
    keep_last: str = _env("WALSHIP_KEEP_LAST", default="")
    keep_window: str = _env("WALSHIP_KEEP_WINDOW", default="")
    keep_daily: str = _env("WALSHIP_KEEP_DAILY", default="")
    keep_weekly: str = _env("WALSHIP_KEEP_WEEKLY", default="")
    keep_monthly: str = _env("WALSHIP_KEEP_MONTHLY", default="")
    keep_yearly: str = _env("WALSHIP_KEEP_YEARLY", default="")
    #: Folder with the server's programs (postgres, pg_ctl), for ``restore --start``; empty: look in the usual places.
    pg_bin_dir: Path | None = _env("WALSHIP_PG_BIN_DIR", default=None)
    #: Longest wait in seconds for the WAL of a base backup to become safe.
    wal_timeout: float = _env("WALSHIP_WAL_TIMEOUT", default=600.0, gt=0)

    @field_validator("destinations", "required", "sources", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """``a,b`` → ``("a", "b")``; ``all`` means nothing is left out."""
        if isinstance(value, str):
            parts = _split(value)
            return () if parts == ("all",) else parts
        return value

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        if value != "off":
            listen_address(value)
        return value

    @field_validator(
        "time_zone", "schedule_full", "schedule_incremental", "schedule_expire", "schedule_verify", "schedule_drill"
    )
    @classmethod
    def _check_schedule(cls, value: str, info: ValidationInfo) -> str:
        if value not in ("", "UTC"):
            from infra.cron import Cron, zone  # what most commands need not load

            try:
                zone(value) if info.field_name == "time_zone" else Cron(value)
            except ConfigError as error:
                raise ConfigError(f"WALSHIP_{str(info.field_name).upper()}: {error.fact}", hint=error.hint) from None
        return value

    @field_validator("postgres_port", mode="before")
    @classmethod
    def _ports(cls, value: Any) -> str:
        text = str(value)
        for port in text.split(","):
            if not re.fullmatch(r"\s*[0-9]{1,5}\s*", port) or not 1 <= int(port) <= 65535:
                raise ValueError(f"{port.strip()!r} is no port; one is a number from 1 to 65535")
        return text

    @model_validator(mode="after")
    def _check_interval(self) -> Settings:
        self.verify_span  # noqa: B018  ConfigError for what is no span
        return self

    @model_validator(mode="after")
    def _check_retention(self) -> Settings:
        if any(
            (self.keep_last, self.keep_window, self.keep_daily, self.keep_weekly, self.keep_monthly, self.keep_yearly)
        ):
            self.retention  # noqa: B018  ConfigError for what contradicts itself
        return self

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        hosts, ports = len(_split(self.postgres_host)), len(_split(self.postgres_port))
        if not hosts:
            raise ValueError("POSTGRES_HOST names no server")
        if ports not in (1, hosts):
            raise ValueError(f"POSTGRES_PORT has {ports} ports for {hosts} servers; give one for all, or one for each")
        if unknown := set(self.required) - set(self.destinations):
            # Without user and options: there may be a password in them.
            names = sorted(re.sub(r"(?<=//)[^/]*@|\?.*", "", url) for url in unknown)
            raise ValueError(f"WALSHIP_REQUIRED names {', '.join(names)}, which is no destination")
        if len(set(self.destinations)) != len(self.destinations):
            raise ValueError("WALSHIP_DESTINATIONS names a destination twice")
        if unknown := set(self.sources) - {"watch", "stream"}:
            raise ValueError(f"WALSHIP_SOURCES knows watch and stream, not {', '.join(sorted(unknown))}")
        if self.compression_level is not None:
            from handlers.compress import Compress  # what most commands need not load

            Compress(self.compression, self.compression_level)  # knows the levels of each codec; ConfigError
        keys = self.passphrase or self.identity_file or self.writer_file
        if (self.backup_encryption_enabled or self.wal_encrypted) and not keys:
            raise ValueError(
                "encryption is on, and BACKUP_ENCRYPTION_PASSWORD (or its _FILE) is empty, as are WALSHIP_IDENTITY_FILE"
                " and WALSHIP_WRITER_FILE"
            )
        return self

    @property
    def servers(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each server, in the order given."""
        hosts, ports = _split(self.postgres_host), _split(self.postgres_port)
        return tuple(zip(hosts, map(int, ports * len(hosts) if len(ports) == 1 else ports), strict=True))

    @property
    def required_urls(self) -> tuple[str, ...]:
        """Of the destinations, those that must hold an object before it is acknowledged."""
        return tuple(url for url in self.destinations if not self.required or url in self.required)

    @property
    def listens(self) -> str:
        """``host:port``, or empty if nothing is to be served."""
        return "" if self.listen == "off" else self.listen

    @property
    def verify_span(self) -> timedelta | None:
        """How long an object that was verified is trusted; None: never. Raises ConfigError."""
        text = self.verify_interval.strip()
        return None if text == "0" else parse_window(text, "WALSHIP_VERIFY_INTERVAL")

    @property
    def retention(self) -> Policy | None:
        """What shall be kept; None: nothing is said, so nothing is ever deleted. Raises ConfigError."""
        from infra.cron import zone

        generations = {name: str(getattr(self, f"keep_{name}")) for name in ("daily", "weekly", "monthly", "yearly")}
        return make_policy(
            last=self.keep_last, window=self.keep_window, generations=generations, zone=zone(self.time_zone)
        )

    def at(self, *servers: tuple[str, int]) -> Self:
        """These settings for some of the servers alone."""
        hosts, ports = ",".join(host for host, _ in servers), ",".join(str(port) for _, port in servers)
        return self.model_copy(update={"postgres_host": hosts, "postgres_port": ports})

    def for_backups(self) -> Self:
        """These settings for the server that base backups are taken from."""
        if not self.backup_host:
            return self
        host, colon, port = self.backup_host.rpartition(":")
        bare = ":" in host and not host.startswith("[")  # an IPv6 address has a port behind brackets only
        if not colon or not port.isdecimal() or bare:
            host, port = self.backup_host, "5432"
        return self.at((host.strip("[]"), int(port)))

    @property
    def wal_encrypted(self) -> bool:
        """Whether WAL is encrypted; unless said otherwise, as base backups are."""
        enabled = self.wal_encryption_enabled
        return self.backup_encryption_enabled if enabled is None else enabled

    @property
    def passphrase(self) -> str:
        return self.backup_encryption_password.get_secret_value()


def listen_address(listen: str) -> tuple[str, int]:
    """``host:port`` or ``[IPv6 address]:port`` → host and port. Raises ValueError."""
    host, _, port = listen.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare and bare == host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError("it must be host:port, for example 127.0.0.1:9432, or off")
    return bare, int(port)


def _split(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def load(env_file: Path | None = None, *, keyless: bool = False) -> Settings:
    """Read the environment (and ``.env``). Raises ConfigError that names each wrong setting and never its value.

    ``keyless``: for who asks who has the keys, and may have none: nothing is going to be encrypted or read.
    """
    given = _given(env_file)
    _refuse_unknown(given)
    values: dict[str, Any] = {name: value for name, value in given.items() if value and name in known_names()}
    try:
        values |= {name: _content(name, path) for name, path in _secret_files(given).items()}
        if keyless:
            values |= {"BACKUP_ENCRYPTION_ENABLED": "false", "WAL_ENCRYPTION_ENABLED": "false"}
        return Settings(_env_file=None, **values)
    except ValidationError as error:
        wrong = "; ".join(_sentence(dict(e)) for e in error.errors())
        raise ConfigError(wrong, hint=_EXPLAINED) from None


def secret_files(env_file: Path | None = None) -> dict[str, Path]:
    """Name of a secret that was given as ``<NAME>_FILE`` → absolute path of its file; the file is not opened.

    Raises ConfigError if the secret itself is given as well, wherever either of them stands.
    """
    return _secret_files(_given(env_file))


def _secret_files(given: dict[str, str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name in SECRETS:
        if path := given.get(f"{name}_FILE"):
            if given.get(name):
                raise ConfigError(f"{name} and {name}_FILE are both set", hint="keep one of them")
            files[name] = Path(path).absolute()
    return files


def known_names() -> frozenset[str]:
    """Every setting's name in the environment, with the ``_FILE`` twins of secrets."""
    names: set[str] = {f"{name}_FILE" for name in SECRETS}
    for field in Settings.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names.update(str(choice) for choice in field.validation_alias.choices)
    return frozenset(names)


def _given(env_file: Path | None) -> dict[str, str]:
    """All names that are set, in the environment or the file; the environment wins unless it is empty there."""
    written = read_dotfile(env_file or _ENV_FILE, SECRETS)
    return written | {name: value for name, value in os.environ.items() if value or name not in written}


def _refuse_unknown(given: dict[str, str]) -> None:
    import difflib

    known = known_names()
    for name in sorted(given):
        if name.startswith("WALSHIP_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else _EXPLAINED
            raise ConfigError(f"there is no setting {name}", hint=hint)


def _content(name: str, path: Path) -> str:
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    raise ConfigError(
        f"{name}_FILE: {path} cannot be read: {reason}",
        hint=f"it must hold {name} and nothing else, readable for the user that runs walship",
    )


#: In place of what pydantic says of a pattern or a bound.
_PLAIN = {
    "WALSHIP_TAIL_INTERVAL": "must be 0.1 to 3600, in seconds",
    "WALSHIP_SLOT": "must be made of a to z, 0 to 9 and _, at most 63 of them",
    "WALSHIP_SYNC_TIMEOUT": "must be a number of seconds above 0, or empty: wait for ever",
    "WALSHIP_WAL_TIMEOUT": "must be a number of seconds above 0",
    "WALSHIP_PUT_PRICE": "must be a number, 0 or more",
    "WALSHIP_SURVEY_INTERVAL": "must be 1 to 86400, in seconds",
    "WALSHIP_WORKERS": "must be a whole number, 1 to 64",
}


def _sentence(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    message = _PLAIN.get(place) or str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
