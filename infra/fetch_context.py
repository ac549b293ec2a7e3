"""What ``fetch-wal`` needs to answer a recovering server, in one file, so that ``pg_ctl start`` works by hand.

The file (mode 0600, the server's user's, below ``pgsql_tmp.walship/`` in the data directory) holds where the repository
is, the timelines of the plan, the opened data keys (for a standby: what opens those to come) and the store's
credentials. Credentials that were given as
``*_FILE`` are not copied: the path is kept, and the server's user must be able to read it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from handlers.fetch import Fetcher
from handlers.serve_wal import WalServer
from infra.keys import RepositoryKeys
from infra.settings import Settings, secret_files
from infra.storage import open_store
from infra.storage.rooted import Rooted
from pipeline.chain import Chain
from pipeline.contracts import Store
from pipeline.errors import ConfigError
from pipeline.lineage import Leg, Lineage, Stretch
from pipeline.wal import Lsn

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True, slots=True)
class FetchContext:
    """See the module. Everything but ``keys`` and ``credentials`` may be shown."""

    #: URLs, the first is read first.
    destinations: tuple[str, ...]
    system_id: str
    lineage: Lineage
    #: The segments of the plan: one of them that is absent is an error.
    planned: tuple[Stretch, ...]
    allow_unencrypted: bool
    #: ``RepositoryKeys.restore_keys()``.
    keys: bytes = field(repr=False)
    #: Name of a setting → its value; ``<NAME>_FILE`` → path.
    credentials: dict[str, str] = field(repr=False)

    @classmethod
    def of(
        cls,
        settings: Settings,
        destinations: tuple[str, ...],
        system_id: str,
        lineage: Lineage,
        planned: tuple[Stretch, ...],
        keys: RepositoryKeys,
        *,
        allow_unencrypted: bool = False,
        follow: bool = False,
    ) -> FetchContext:
        """From what the restore itself uses; credentials only if a destination is a bucket.

        ``follow``: the server will go on following the archive, and has to read what is encrypted under keys to come.
        """
        credentials: dict[str, str] = {}
        if any(url.startswith("s3:") for url in destinations):
            given = (settings.aws_access_key_id, settings.aws_secret_access_key)
            files = secret_files()
            for name, value in zip(_CREDENTIALS, given, strict=True):
                if path := files.get(name):
                    credentials[f"{name}_FILE"] = str(path)
                elif value.get_secret_value():
                    credentials[name] = value.get_secret_value()
        secret = keys.restore_keys(follow=follow)
        return cls(destinations, system_id, lineage, planned, allow_unencrypted, secret, credentials)

    def encode(self) -> bytes:
        """The content of the file; secret."""
        return json.dumps(
            {
                "walship_fetch_context": 1,
                "destinations": self.destinations,
                "system_id": self.system_id,
                "segment_size": self.lineage.segment_size,
                "timelines": [
                    {"timeline": leg.timeline, "begin": str(leg.begin), "end": str(leg.end) if leg.end else None}
                    for leg in self.lineage.legs
                ],
                "planned": [[s.timeline, s.first, s.end, s.tail] for s in self.planned],
                "allow_unencrypted": self.allow_unencrypted,
                "keys": self.keys.decode(),
                "credentials": self.credentials,
            },
            indent=1,
        ).encode()

    @classmethod
    def read(cls, path: Path) -> FetchContext:
        """The context in a file. Raises ConfigError, which never shows what is in it."""
        try:
            members: dict[str, Any] = json.loads(path.read_bytes())
            if members["walship_fetch_context"] != 1:
                raise ConfigError(f"{path} is from another version of walship", hint="restore again with this one")
            legs = tuple(
                Leg(leg["timeline"], Lsn.parse(leg["begin"]), Lsn.parse(leg["end"]) if leg["end"] else None)
                for leg in members["timelines"]
            )
            return cls(
                tuple(members["destinations"]),
                members["system_id"],
                Lineage(legs, members["segment_size"]),
                tuple(Stretch(timeline, first, end, tail=tail) for timeline, first, end, tail in members["planned"]),
                members["allow_unencrypted"],
                members["keys"].encode(),
                dict(members["credentials"]),
            )
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is damaged", hint="restore again") from None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[WalServer]:
        """Ready to answer. Nothing is asked of the environment; no key ring, and data keys only when one is unknown."""
        # Defaults and nothing else: the environment of a PostgreSQL server is not ours to read settings from.
        settings = Settings.model_construct(**self._settings())
        keys = RepositoryKeys.from_restore_keys(self.keys, allow_unencrypted=self.allow_unencrypted)
        chain = Chain([Compress("none"), Encrypt(keys, lambda _: "none"), Checksum()], keys, self.system_id)
        async with AsyncExitStack() as stack:
            stores: list[Store] = []
            for url in self.destinations:
                store = open_store(url, settings)
                stack.push_async_callback(store.close)
                stores.append(Rooted(store, self.system_id))
            fetch = Fetcher(stores, chain, self.system_id, refresh=lambda: keys.refresh_from(stores))
            yield WalServer(fetch, self.lineage, self.planned)

    def _settings(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in self.credentials.items():
            if name.endswith("_FILE"):
                try:
                    secret = Path(value).read_text("utf-8").rstrip("\r\n")
                except OSError as error:
                    raise ConfigError(
                        f"{name}: {value} cannot be read: {error.strerror}",
                        hint="the user that runs PostgreSQL must be able to read it",
                    ) from None
            else:
                secret = value
            values[name.removesuffix("_FILE").lower()] = SecretStr(secret)
        return values
