"""The header of a stored object: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError
from pipeline.objects import MAGIC, MAX_HEADER, MAX_PLAIN, Header, read_header, strict_json

HEADER = Header("wal/x", "7", "zstd", "none", "", "", 3, "ab", "2026-01-14T12:00:00.000Z", "")


def front(text: bytes) -> bytes:
    return MAGIC + len(text).to_bytes(4, "big") + text


def with_members(**change: Any) -> bytes:
    return front(json.dumps({**HEADER.members(), **change}).encode())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(name=TEXT, fingerprint=TEXT, backup=TEXT, size=st.integers(0, MAX_PLAIN), more=st.binary(max_size=9))
def test_round_trip(name: str, fingerprint: str, backup: str, size: int, more: bytes) -> None:
    header = replace(HEADER, name=name, fingerprint=fingerprint, backup=backup, plain_size=size)
    read, offset = read_header("x", header.encoded() + more)
    assert read == header
    assert read.encoded() == header.encoded() == (header.encoded() + more)[:offset]


def test_the_bytes_that_were_read_are_kept() -> None:
    spaced = front(json.dumps(HEADER.members(), indent=3).encode())
    read, _ = read_header("wal/x", spaced)
    assert read == HEADER
    assert read.encoded() == spaced != HEADER.encoded()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "is no walship object"),
        (b"PGDATA", "is no walship object"),
        (b"WALSHIP", "is cut or damaged"),
        (b"WALSHIP\x02" + bytes(40), "is of format 2; this walship reads format 1"),
        (MAGIC + b"\0\0", "is cut or damaged"),
        (MAGIC + b"\xff\xff\xff\xff{}", "is cut or damaged: its header should be 4294967295 bytes"),
        (front(b"{" * 10)[:-1], "is cut or damaged"),
        (MAGIC + (MAX_HEADER + 1).to_bytes(4, "big") + bytes(MAX_HEADER + 1), "is cut or damaged"),
        (front(b""), "cannot be read"),
        (front(b"[]"), "it is not an object"),
        (front(b"\xff\xfe"), "cannot be read"),
        (front(b"[" * 60_000), "it is nested too deeply"),
        (front(b'{"name":"wal/x"}'), "unknown or missing members: backup"),
        (with_members(more=1), "unknown or missing members: more"),
        (with_members(plain_size="3"), "plain_size is not int"),
        (with_members(plain_size=3.0), "plain_size is not int"),
        (with_members(plain_size=True), "plain_size is not int"),
        (with_members(system_id=7), "system_id is not str"),
        (with_members(key=None), "key is not str"),
        (with_members(plain_size=-1), "claims -1 bytes"),
        (with_members(plain_size=MAX_PLAIN + 1), "claims 1073741825 bytes of plaintext; the format allows"),
        (front(b'{"plain_size":' + b"9" * 5000 + b"}"), "cannot be read"),
        (front(HEADER.encoded()[12:-1] + b',"name":"wal/x"}'), "a member is doubled"),
        (front(HEADER.encoded()[12:] + b" 1"), "cannot be read"),
    ],
)
def test_what_is_no_header_is_refused(content: bytes, fact: str) -> None:
    with pytest.raises(IntegrityError, match=r"wal/x") as error:
        read_header("wal/x", content)
    assert fact in error.value.fact


def test_a_header_that_would_be_too_large_is_not_written() -> None:
    with pytest.raises(IntegrityError, match="more than 65536"):
        replace(HEADER, name="x" * MAX_HEADER).encoded()


def test_doubled_members_are_refused_at_every_depth() -> None:
    assert strict_json(b'{"a":{"b":1}}') == {"a": {"b": 1}}
    with pytest.raises(ValueError, match="doubled"):
        strict_json(b'{"a":[{"b":1,"b":2}]}')
