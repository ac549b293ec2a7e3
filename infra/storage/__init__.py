"""The stores, and how a destination's URL names one.

file:///backups/pg
s3://bucket/prefix?endpoint=http://s3:8333&region=us-east-1
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, parse_qsl, unquote, urlsplit

from infra.clock import SystemClock
from infra.settings import Settings
from infra.storage.local import LocalStore
from infra.storage.retry import Observer, Retrying, RetryPolicy
from infra.storage.rooted import Rooted
from pipeline.contracts import Clock, Store
from pipeline.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from infra.storage.s3_client import S3Options
    from infra.storage.s3_versions import S3Versions

#: The options of an S3 destination, and what each may be; an empty tuple means any text.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "endpoint": (),
    "region": (),
    "path_style": ("true", "false"),
    "checksums": ("when_required", "when_supported"),
    "ca": (),
    "sse": ("AES256", "aws:kms", "aws:kms:dsse"),
    "kms_key": (),
    "storage_class": (),
    "lock": ("GOVERNANCE", "COMPLIANCE"),
    "as_of": (),
}
_FORMS = "a destination is file:///folder or s3://bucket/prefix?endpoint=…&region=…"


def open_store(
    url: str,
    settings: Settings,
    *,
    clock: Clock | None = None,
    policy: RetryPolicy | None = None,
    observe: Observer | None = None,
) -> Store:
    """The store of a destination, with patience around it. Nothing is contacted yet. Raises ConfigError."""
    parts = _split(url)
    store: Store
    if parts.scheme == "file":
        store = LocalStore(_folder(url))
    elif parts.scheme == "s3":
        store = _bucket(url, settings)
    else:
        raise ConfigError(f"{display_name(url)} is no destination", hint=_FORMS)
    return Retrying(store, clock or SystemClock(), policy, observe=observe or (lambda *_: None))


def is_past(url: str) -> bool:
    """Whether the destination is seen as it was at a moment."""
    return "as_of" in parse_qs(_split(url).query)


def display_name(url: str) -> str:
    """The URL as people and metrics see it: without anything that could be a secret, nor options but ``as_of``."""
    parts = _split(url)
    moment = parse_qs(parts.query).get("as_of", [""])[0]
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    return f"{shown} as of {moment}" if moment else shown


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:  # not shown: there may be a password in it
        raise ConfigError(f"a destination is not a URL: {error}", hint=_FORMS) from None


def make_folder(url: str) -> None:
    """Create the folder of a ``file:`` destination if the one above is there; nothing for others. For ``init``.

    Only ``init`` may do this: a folder that is suddenly absent is a disk that is not mounted. Raises StoreError.
    """
    if _split(url).scheme != "file":
        return
    folder = _folder(url)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the folder {folder} cannot be made: {error.strerror}", hint="create it for the user that runs walship"
        ) from error


def _folder(url: str) -> Path:
    parts = _split(url)
    folder = Path(unquote(parts.path))
    if parts.netloc not in {"", "localhost"}:
        raise ConfigError(
            f"{display_name(url)} names a host, or is a relative path", hint="a folder is file:///absolute/path"
        )
    if not folder.is_absolute() or ".." in folder.parts or folder == Path("/"):
        raise ConfigError(
            f"{display_name(url)} is not the absolute path of a folder", hint="a folder is file:///absolute/path"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{display_name(url)} has options, and a folder has none", hint=_FORMS)
    return folder


def _bucket(url: str, settings: Settings) -> Store:
    # A sixth of a second and 20 MB of libraries, which whoever has only folders need not pay.
    from infra.storage.s3 import S3Store
    from infra.storage.s3_past import S3Past

    options, moment, prefix = _s3(url, settings)
    store = S3Past(options, moment) if moment else S3Store(options)
    if not prefix:
        return store
    name = display_name(url)
    try:
        return Rooted(store, prefix, name=name)
    except StoreError as error:
        raise ConfigError(
            f"{name} has a prefix that cannot be one: {error.fact}",
            hint="name folders and a / between them, for example s3://bucket/backups/walship",
        ) from None


def open_versions(url: str, settings: Settings) -> tuple[S3Versions, str]:
    """The bucket of an ``s3:`` destination, to look at its versions, and the prefix in it: empty, or with a / behind.

    Without patience: each question is asked once. Raises ConfigError.
    """
    from infra.storage.s3_versions import S3Versions

    options, _, prefix = _s3(url, settings)
    return S3Versions(options), f"{prefix}/" if prefix else ""


def _s3(url: str, settings: Settings) -> tuple[S3Options, datetime | None, str]:
    """How the bucket is reached, as of when it is seen, and the prefix."""
    from infra.storage.s3_client import S3Options

    parts, name = _split(url), display_name(url)
    if not parts.netloc or "@" in parts.netloc or ":" in parts.netloc:
        raise ConfigError(
            f"{name} names no bucket, or more than a bucket",
            hint=f"{_FORMS}; the server is its endpoint, and credentials come from AWS_ACCESS_KEY_ID",
        )
    if parts.fragment:
        raise ConfigError(f"{name} has a part behind #", hint=_FORMS)
    options = _options(name, parts.query)
    moment = _moment(name, options.pop("as_of")) if "as_of" in options else None
    access, secret = settings.aws_access_key_id.get_secret_value(), settings.aws_secret_access_key.get_secret_value()
    if bool(access) != bool(secret):
        raise ConfigError("of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only one is set", hint="set both, or none")
    reached = S3Options(
        bucket=parts.netloc,
        access_key=access,
        secret_key=secret,
        session_token=os.environ.get("AWS_SESSION_TOKEN", "") if access else "",
        **options,
    )
    return reached, moment, unquote(parts.path).strip("/")


def _options(name: str, query: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise ConfigError(f"the options of {name} are not key=value&key=value", hint=_FORMS) from None
    options: dict[str, Any] = {}
    for key, value in pairs:
        if key not in _OPTIONS:
            raise ConfigError(f"{name} has an unknown option {key}", hint=f"there are {', '.join(_OPTIONS)}")
        if key in options:
            raise ConfigError(f"{name} has the option {key} twice", hint="keep one of them")
        if not value or (_OPTIONS[key] and value not in _OPTIONS[key]):
            allowed = " or ".join(_OPTIONS[key]) or "not empty"
            raise ConfigError(f"the option {key} of {name} is {value!r}", hint=f"it must be {allowed}")
        options[key] = value
    if "path_style" in options:
        options["path_style"] = options["path_style"] == "true"
    # What botocore itself would look at; said here so that the path style goes with it.
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if environment:
        options.setdefault("endpoint", environment)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options.setdefault("region", region)
    endpoint = options.get("endpoint")
    if endpoint is not None:
        try:
            address = urlsplit(endpoint)
            address.port  # noqa: B018  ValueError if it is none
        except ValueError as error:
            raise ConfigError(
                f"the endpoint of {name} is not a URL: {error}", hint="an endpoint is https://host:port"
            ) from None
        if address.scheme not in {"http", "https"} or not address.hostname or address.username or address.query:
            raise ConfigError(
                f"the endpoint of {name} is no http:// or https:// address of a server",
                hint="an endpoint is https://host:port, without user and password",
            )
    return options


def _moment(name: str, text: str) -> datetime:
    """As ``as_of`` says it: never as seen from now, for the URL is read again and again."""
    with suppress(ValueError):
        if (moment := datetime.fromisoformat(text)).tzinfo is not None:
            return moment
    raise ConfigError(f"the option as_of of {name} is {text!r}", hint="it must be like 2026-11-23T12:00:00Z")
