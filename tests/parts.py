"""A small real way to ship: the chain without encryption, into a store in memory. For tests of what makes objects."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

from handlers.body import collect
from handlers.checksum import Checksum
from handlers.compress import Compress
from infra.storage.memory import MemoryStore
from pipeline.backup import BackupInfo
from pipeline.catalog import index_key, info_key, manifest_key, part_key
from pipeline.chain import Chain, Expected
from pipeline.contracts import Buffer, DataKey, Shipped
from pipeline.errors import ConfigError


class PlainKeys:
    """A repository without keys."""

    def current(self) -> DataKey:
        raise ConfigError("there are no keys here")

    def find(self, key_id: str) -> DataKey:
        raise ConfigError(f"there is no key {key_id} here")

    def must_encrypt(self, name: str) -> bool:
        return not name

    def fingerprint(self, name: str, plain: Buffer) -> str:
        return hashlib.sha256(name.encode() + b"\0" + plain).hexdigest()


class Shelf:
    """A ``Ship`` that remembers the order in which objects became durable, and how many were under way at once."""

    def __init__(self, system_id: str = "7", *, before: Callable[[str], None] = lambda _: None) -> None:
        self.store = MemoryStore()
        self.chain = Chain([Compress("zstd", 1), Checksum()], PlainKeys(), system_id)
        self.system_id = system_id
        self.names: list[str] = []
        self.digests: dict[str, str] = {}
        self.most = 0
        self._now = 0
        self._before = before

    async def __call__(
        self,
        name: str,
        plain: Buffer,
        *,
        backup: str = "",
        encoded: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> Shipped:
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            self._before(name)
            pieces = self.chain.encode(name, plain, backup=backup, created=datetime.now(UTC))
            body = await asyncio.to_thread(collect, pieces)
            await self.store.put(name, body)
        finally:
            self._now -= 1
        digest = b"".join(body.chunks())[-32:].hex()
        self.names.append(name)
        self.digests[name] = digest
        return Shipped(name, body.size, digest)

    async def read(self, name: str, backup: str = "") -> bytes:
        body = await self.store.get(name)
        return bytes(self.chain.decode(Expected(name, self.system_id, backup), body.chunks())[1])

    async def archive(self, info: BackupInfo, name: str) -> bytes:
        """All parts of an archive, joined."""
        (archive,) = (a for a in info.archives if a.name == name)
        keys = [part_key(info.name, name, number + 1) for number in range(len(archive.parts))]
        assert [self.digests[key] for key in keys] == list(archive.parts)
        return b"".join([await self.read(key, info.id) for key in keys])

    async def manifest(self, info: BackupInfo) -> bytes:
        return await self.read(manifest_key(info.name), info.id)

    async def index(self, info: BackupInfo) -> list[bytes]:
        keys = [index_key(info.name, number + 1) for number in range(len(info.index))]
        assert [self.digests[key] for key in keys] == list(info.index)
        return b"".join([await self.read(key, info.id) for key in keys]).splitlines()

    async def info(self, name: str, backup: str) -> BackupInfo:
        return BackupInfo.decode(name, await self.read(info_key(name), backup))

    @property
    def backups(self) -> list[str]:
        """Names of all backup_info objects."""
        return [name for name in self.names if name.endswith("/backup_info")]
