"""The stored object, format 1: bytes in, bytes out. ``docs/format.md`` is the full text.

    8 bytes   b"WALSHIP" and the format byte 0x01
    4 bytes   length of the header, big-endian, at most 64 KiB
    header    JSON, UTF-8
    frames    what the stages made of the plaintext
    32 bytes  SHA-256 of all before it

The header is hashed and authenticated as the bytes that were read, never as bytes made again from its values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, TypeAlias

from pipeline.errors import IntegrityError

_Buffer: TypeAlias = bytes | bytearray | memoryview  # as contracts.Buffer, which imports this module

MAGIC = b"WALSHIP\x01"
MAX_HEADER = 64 * 1024
TRAILER_SIZE = 32
#: The largest plaintext of one object: a segment of 1 GiB. A reader refuses more before it allocates anything.
MAX_PLAIN = 1 << 30
#: How many bytes from the front of an object hold its whole header.
MAX_HEAD = len(MAGIC) + 4 + MAX_HEADER


@dataclass(frozen=True, slots=True)
class Header:
    """What an object says of itself. All members are always there."""

    #: Key of the object below ``<system identifier>/``.
    name: str
    #: System identifier of the cluster, as decimal digits: it does not fit the integers of JSON readers.
    system_id: str
    #: zstd, lz4, gzip or none.
    codec: str = "none"
    #: aes-256-gcm, chacha20-poly1305, aes-256-cbc, aes-192-cbc, aes-128-cbc or none.
    cipher: str = "none"
    #: Id of the data key, empty if not encrypted.
    key: str = ""
    #: 32 random bytes as hex, fresh for each object; empty if not encrypted.
    salt: str = ""
    #: Bytes of plaintext.
    plain_size: int = 0
    #: Digest of name and plaintext (keyed where there is a key ring), as hex; empty in a part of a backup, and then
    #: equal to nothing.
    fingerprint: str = ""
    #: When it was made, RFC 3339 in UTC.
    created: str = ""
    #: Random id of the base backup that the object is a part of, else empty.
    backup: str = ""
    #: The bytes this header was read from; empty in one that was just made.
    raw: bytes = field(default=b"", compare=False, repr=False)

    def encoded(self) -> bytes:
        """Magic, length and JSON: all of the object that comes before the frames."""
        text = self.raw or json.dumps(self.members(), separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > MAX_HEADER:
            raise IntegrityError(f"the header of {self.name} would be {len(text)} bytes, more than {MAX_HEADER}")
        return MAGIC + len(text).to_bytes(4, "big") + text

    def members(self) -> dict[str, str | int]:
        """The JSON object, in the order it is written."""
        return {name: getattr(self, name) for name in _MEMBERS}


_MEMBERS: dict[str, type] = {f.name: int if f.name == "plain_size" else str for f in fields(Header) if f.name != "raw"}


def read_header(name: str, front: _Buffer) -> tuple[Header, int]:
    """The header at the front of an object, and the offset of its first frame.

    ``name`` is for messages only: whether it is the *right* name is for the caller to enforce. ``front`` needs at most
    the first ``MAX_HEAD`` bytes. Raises IntegrityError.
    """
    front = bytes(front[:MAX_HEAD])
    if front[:7] != MAGIC[:7]:
        raise IntegrityError(f"{name} is no walship object: it begins with {front[:8]!r}")
    if len(front) > 7 and front[7] != MAGIC[7]:
        raise IntegrityError(
            f"{name} is of format {front[7]}; this walship reads format {MAGIC[7]}",
            hint="read it with the walship version that wrote it, or a newer one",
        )
    size = int.from_bytes(front[8:12], "big")
    if len(front) < 12 or size > MAX_HEADER or len(front) < 12 + size:
        raise IntegrityError(f"{name} is cut or damaged: its header should be {size} bytes")
    raw = front[12 : 12 + size]
    return _parse(name, raw), 12 + size


def begin_reading(name: str, stored: Iterable[_Buffer]) -> tuple[Header, Iterator[_Buffer]]:
    """The header of an object that comes in pieces, and the pieces behind it: frames and trailer. See ``read_header``.

    A first piece that holds the whole header is not copied.
    """
    source = iter(stored)
    front: _Buffer = next(source, b"")
    if len(front) < MAX_HEAD:
        gathered = bytearray(front)
        for piece in source:
            gathered += piece
            if len(gathered) >= MAX_HEAD:
                break
        front = gathered
    header, offset = read_header(name, front)
    return header, chain((memoryview(front)[offset:],), source)


def strict_json(text: bytes) -> Any:
    """JSON in which no member is doubled: readers disagree about which of two counts. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a member is doubled")
        return members

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_members(what: str, text: bytes, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object that has exactly the members ``kinds``, each of that type. Raises IntegrityError about ``what``."""
    try:
        return check_members(strict_json(text), kinds)
    except ValueError as error:
        raise IntegrityError(f"{what} cannot be read: {error}") from None


def check_members(found: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """``found``, if it is a JSON object with exactly the members ``kinds``, each of that type. Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError("it is not an object")  # noqa: TRY004  # what was read is wrong, not what was called
    if found.keys() != kinds.keys():
        odd = sorted(found.keys() ^ kinds.keys())
        raise ValueError(f"unknown or missing members: {', '.join(odd)[:200]}")
    for member, kind in kinds.items():
        if type(found[member]) is not kind:
            raise ValueError(f"{member} is not {kind.__name__}")
    return found


def _parse(name: str, raw: bytes) -> Header:
    members = read_members(f"the header of {name}", raw, _MEMBERS)
    header = Header(**members, raw=raw)
    if not 0 <= header.plain_size <= MAX_PLAIN:
        raise IntegrityError(f"{name} claims {header.plain_size} bytes of plaintext; the format allows {MAX_PLAIN}")
    return header


class MemoryBody:
    """A body held in memory, as the pieces it was made of."""

    __slots__ = ("_pieces", "size")

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = tuple(pieces)
        self.size = sum(map(len, self._pieces))

    def chunks(self) -> Iterator[bytes]:
        return iter(self._pieces)

    def close(self) -> None:
        """Nothing to free: the pieces go with the last reference."""
