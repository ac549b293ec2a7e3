"""A manifest is believed only whole."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest

from pipeline.errors import IntegrityError
from pipeline.manifest import WalRange, files_of, last_modified, read_manifest, top_names
from pipeline.wal import Lsn
from tests import laying

RANGES = (
    b'{ "Timeline": 2, "Start-LSN": "0/5000000", "End-LSN": "0/6000100" },\n'
    b'{ "Timeline": 1, "Start-LSN": "0/4000028", "End-LSN": "0/5000000" }'
)
FILE = b'{ "Path": "PG_VERSION", "Size": 3, "Last-Modified": "2026-01-%02d 12:00:00 GMT" }'


def manifest(ranges: bytes = RANGES, *, front: bytes = b'Version": 2,\n"System-Identifier": 7') -> bytes:
    files = b",\n".join(FILE % day for day in (3, 14, 9))
    lines = b'{ "PostgreSQL-Backup-Manifest-%b,\n"Files": [\n%b ],\n"WAL-Ranges": [\n%b\n],\n' % (front, files, ranges)
    return lines + b'"Manifest-Checksum": "%b"}\n' % hashlib.sha256(lines).hexdigest().encode()


def test_a_whole_manifest_tells_cluster_ranges_and_the_youngest_file() -> None:
    found = read_manifest(manifest())
    assert found.system_id == "7"
    assert found.first == WalRange(1, Lsn.parse("0/4000028"), Lsn.parse("0/5000000"))
    assert found.last == WalRange(2, Lsn.parse("0/5000000"), Lsn.parse("0/6000100"))
    assert last_modified(manifest()) == datetime(2026, 1, 14, 12, tzinfo=UTC)
    assert last_modified(b"{}") is None
    assert read_manifest(manifest(front=b'Version": 1')).system_id == ""


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "is cut, or none"),
        (manifest()[:-10], "is cut, or none"),
        (manifest().replace(b"0/6000100", b"0/6000200"), "does not match its own checksum"),
        (manifest(front=b'Version": 2'), "does not tell its cluster"),
        (manifest(b""), "WAL-Ranges of the backup_manifest cannot be read: there is none"),
        (manifest(b"1"), "it is not an object"),
        (manifest(RANGES.replace(b'"Timeline": 2', b'"Timeline": "2"')), "Timeline is not int"),
        (manifest(RANGES.replace(b'"Timeline": 2', b'"Timeline": 0')), "timeline 0 does not exist"),
        (manifest(RANGES.replace(b'"0/4000028"', b'"4000028"')), "is not an LSN"),
        (manifest(RANGES.replace(b'"0/4000028"', b'"0/5000028"')), "ends before it begins"),
    ],
)
def test_a_manifest_that_is_none_is_refused(content: bytes, fact: str) -> None:
    with pytest.raises(IntegrityError, match=fact):
        read_manifest(content)


def test_the_names_at_the_top_are_those_of_the_files() -> None:
    files = {"a": b"", "b c/d": b"", "b c/e/f": b"", '\u00fc "x\\': b"", "odd\udcff/g": b"", "empty/": b""}
    content = laying.manifest({"base": files, "17": {"PG_17_1/1": b""}})
    names = top_names(content)
    assert names == {line.path.partition("/")[0] for line in files_of(content)}
    assert names == {"a", "b c", '\u00fc "x\\', "odd\udcff", "pg_tblspc"}
