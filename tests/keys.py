"""Real keyrings for tests, without the cost of scrypt: made in memory and not read from a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime

from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from infra.keys import Policy, RepositoryKeys
from infra.ring import fresh_ring
from pipeline.chain import Chain, Expected
from pipeline.contracts import Buffer

SYSTEM_ID = "7590000000000000007"
NOW = datetime(2026, 1, 14, 12, tzinfo=UTC)


def encrypting_keys(policy: Policy | None = None, *, allow_unencrypted: bool = False) -> RepositoryKeys:
    """A repository that encrypts everything, opened for writing."""
    policy = policy or Policy(wal=True, base=True)
    ring = fresh_ring(SYSTEM_ID, policy)
    keys = RepositoryKeys(SYSTEM_ID, ring, policy, store=None, allow_unencrypted=allow_unencrypted)
    keys._begin_writing(ring, NOW)
    return keys


def plain_keys() -> RepositoryKeys:
    """A repository without a key ring."""
    return RepositoryKeys(SYSTEM_ID, None, Policy(wal=False, base=False), store=None, allow_unencrypted=False)


def chain(
    keys: RepositoryKeys, codec: str = "zstd", cipher: str | Callable[[str], str] = "none", system_id: str = SYSTEM_ID
) -> Chain:
    """The stages as wiring joins them."""
    chosen = cipher if callable(cipher) else lambda _name: cipher
    return Chain([Compress(codec), Encrypt(keys, chosen), Checksum()], keys, system_id)


def stored(chosen: Chain, name: str, plain: Buffer, *, backup: str = "") -> bytes:
    """All bytes of one object."""
    return b"".join(bytes(piece) for piece in chosen.encode(name, plain, backup=backup, created=NOW))


def read(chosen: Chain, name: str, content: bytes, *, backup: str | None = "", system_id: str = SYSTEM_ID) -> bytes:
    """The plaintext of one object."""
    return bytes(chosen.decode(Expected(name, system_id, backup), [content])[1])


def cut(content: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """The same bytes in pieces of those sizes, the rest in one."""
    start = 0
    for size in sizes:
        yield content[start : start + size]
        start += size
    yield content[start:]
