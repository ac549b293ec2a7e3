"""CRC-32C (Castagnoli), the check sum of WAL records, pg_control and PostgreSQL's manifests.

The standard library has another polynomial only. One byte at a time, about 15 MB/s: for single
records, never for segments.
"""

from __future__ import annotations

from pipeline.contracts import Buffer


def _table() -> tuple[int, ...]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - shifted out bit by bit
        entries.append(value)
    return tuple(entries)


_TABLE = _table()


def crc32c(*pieces: Buffer) -> int:
    """The CRC-32C of the pieces, one behind the other, as PostgreSQL's ``FIN_CRC32C`` leaves it."""
    crc = 0xFFFFFFFF
    table = _TABLE
    for piece in pieces:
        for byte in bytes(piece):
            crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
