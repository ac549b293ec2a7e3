"""What S3 look-alikes and networks do at times, from a server in this process."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from handlers.body import collect, joined
from infra.clock import SystemClock
from infra.storage import s3, s3_client
from infra.storage.retry import AT_ONCE, Retrying
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody
from tests.contract.lookalike import LookAlike, answers, cuts_the_body, hangs_up, look_alike, without_etag

BODY = MemoryBody((b"hello ", b"world"))


@pytest.fixture
async def server() -> AsyncIterator[LookAlike]:
    async with look_alike() as server:
        yield server


@pytest.fixture
async def store(server: LookAlike) -> AsyncIterator[s3.S3Store]:
    store = server.store()
    yield store
    await store.close()


@pytest.fixture
def patient(store: s3.S3Store) -> Retrying:
    return Retrying(store, SystemClock(), AT_ONCE)


async def test_a_put_is_protected_by_md5_and_plain(server: LookAlike, store: s3.S3Store) -> None:
    await store.put("a", BODY)
    ((_, headers),) = server.requests
    assert headers["Content-MD5"] == base64.b64encode(hashlib.md5(b"hello world").digest()).decode()
    assert "content-md5" in headers["Authorization"]
    assert headers["If-None-Match"] == "*"
    assert headers["Content-Length"] == "11"
    assert not {"Expect", "Transfer-Encoding", "Content-Encoding"} & set(headers)
    assert not [name for name in headers if name.lower().startswith("x-amz-checksum")]
    assert server.objects["a"] == b"hello world"


async def test_newer_checksums_on_demand(server: LookAlike) -> None:
    store = server.store("when_supported")
    await store.put("a", BODY)
    await store.close()
    ((_, headers),) = server.requests
    assert headers["x-amz-checksum-sha256"] == base64.b64encode(hashlib.sha256(b"hello world").digest()).decode()
    assert "Content-MD5" not in headers
    assert server.objects["a"] == b"hello world"


async def test_where_conditions_are_ignored_walship_looks_first(server: LookAlike, store: s3.S3Store) -> None:
    server.objects["probe"] = b"hello world"
    found = await store.probe("probe", BODY)
    assert not found.conditional_put
    assert "ignores If-None-Match" in found.remark
    assert server.objects["probe"] == b"hello world"
    await store.put("a", BODY)
    with pytest.raises(ObjectConflict):
        await store.put("a", MemoryBody((b"other",)))
    assert server.objects["a"] == b"hello world"
    await store.put("a", MemoryBody((b"other",)), replace=True)
    assert server.objects["a"] == b"other"


async def test_where_conditions_are_refused_walship_looks_first(server: LookAlike, store: s3.S3Store) -> None:
    server.faults = [answers(501, "NotImplemented")]
    server.objects["a"] = b"there"
    with pytest.raises(ObjectConflict):
        await store.put("a", BODY)
    await store.put("b", BODY)
    assert server.objects == {"a": b"there", "b": b"hello world"}
    server.faults = [answers(501, "NotImplemented")]
    found = await store.probe("b", BODY)
    assert not found.conditional_put
    assert "refuses If-None-Match" in found.remark


@pytest.mark.parametrize(
    "fault", [answers(200, "InternalError"), without_etag, answers(400, "BadDigest"), answers(500, "InternalError")]
)
async def test_an_unbelievable_answer_to_a_put_is_tried_again(
    server: LookAlike, store: s3.S3Store, patient: Retrying, fault: object
) -> None:
    server.faults = [fault]  # type: ignore[list-item]  # each is a Fault, which pytest forgets
    with pytest.raises(StoreError) as raised:
        await store.put("a", BODY)
    assert raised.value.passing
    assert "a" not in server.objects
    server.faults = [fault]  # type: ignore[list-item]  # as above
    await patient.put("a", BODY)
    assert server.objects["a"] == b"hello world"


@pytest.mark.parametrize(
    "faults",
    [
        [answers(503, "SlowDown"), answers(503, "ServiceUnavailable")],
        [answers(409, "ConditionalRequestConflict")],
        [answers(409, "OperationAborted"), answers(429, "TooManyRequests")],
        [answers(400, "RequestTimeout"), answers(502, "")],
    ],
)
async def test_what_passes_is_tried_again(server: LookAlike, patient: Retrying, faults: list[object]) -> None:
    server.faults = [*faults]  # type: ignore[list-item]  # each is a Fault, which pytest forgets
    await patient.put("a", BODY)
    assert server.objects["a"] == b"hello world"
    assert server.count("PUT") == len(faults) + 1


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "access is denied"),
        (403, "InvalidAccessKeyId", "does not know this access key"),
        (403, "SignatureDoesNotMatch", "secret key does not match"),
        (403, "RequestTimeTooSkewed", "time is refused"),
        (404, "NoSuchBucket", "there is no such bucket"),
        (400, "ExpiredToken", "has expired"),
        (400, "InvalidArgument", "answered 400 InvalidArgument"),
        (400, "EntityTooLarge", "no object of that size"),
    ],
)
async def test_what_does_not_pass_is_told_at_once(
    server: LookAlike, patient: Retrying, status: int, code: str, words: str
) -> None:
    server.faults = [answers(status, code)]
    with pytest.raises(StoreError, match=words) as raised:
        await patient.put("a", BODY)
    assert not raised.value.passing
    assert raised.value.hint
    assert server.count("PUT") == 1
    text = raised.value.fact + raised.value.hint
    assert "s3://bucket" in text
    assert server.endpoint in text
    assert "very-secret" not in text


async def test_retrying_ends_and_says_how_often_it_tried(server: LookAlike, patient: Retrying) -> None:
    server.faults = [answers(503, "SlowDown") for _ in range(AT_ONCE.attempts)]
    with pytest.raises(StoreError, match=rf"SlowDown.*\({AT_ONCE.attempts} attempts in \d+\.\d s\)"):
        await patient.put("a", BODY)
    assert server.count("PUT") == AT_ONCE.attempts


async def test_a_cut_body_is_an_error_and_tried_again(server: LookAlike, store: s3.S3Store, patient: Retrying) -> None:
    server.objects["a"] = b"y" * 1000
    server.faults = [cuts_the_body]
    with pytest.raises(StoreError) as raised:
        await store.get("a")
    assert raised.value.passing
    server.faults = [cuts_the_body]
    assert joined(await patient.get("a")) == b"y" * 1000


async def test_a_range_that_is_not_honoured_is_an_error(server: LookAlike, store: s3.S3Store) -> None:
    server.objects["a"] = b"y" * 1000
    with pytest.raises(StoreError, match="asked for bytes 5 to 10, got no range"):
        await store.get("a", (5, 10))


async def test_another_range_than_asked_for_is_an_error(server: LookAlike, store: s3.S3Store) -> None:
    async def other(_: web.Request) -> web.StreamResponse:
        return web.Response(status=206, body=b"12345", headers={"Content-Range": "bytes 0-4/1000"})

    server.faults = [other]
    with pytest.raises(StoreError, match="got bytes 0-4/1000"):
        await store.get("a", (5, 10))


async def test_a_lost_answer_makes_a_create_meet_itself(server: LookAlike, patient: Retrying) -> None:
    async def stores_and_hangs_up(request: web.Request) -> web.StreamResponse | None:
        server.objects["a"] = await request.read()
        return await hangs_up(request)

    server.faults = [stores_and_hangs_up, answers(412, "PreconditionFailed")]
    with pytest.raises(ObjectConflict):  # whoever called compares the trailers
        await patient.put("a", BODY)
    assert server.objects["a"] == b"hello world"


async def test_a_server_that_hangs_is_given_up(
    server: LookAlike, store: s3.S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "STALL", 0.2)
    monkeypatch.setattr(s3_client, "STALL", 0.2)
    released = asyncio.Event()

    async def hangs(_: web.Request) -> web.StreamResponse | None:
        await released.wait()
        return None

    for call in (lambda: store.put("a", BODY), lambda: store.get("a"), lambda: store.head("a")):
        server.faults = [hangs]
        with pytest.raises(StoreError, match="stopped answering") as raised:
            await call()
        assert raised.value.passing
    released.set()


async def test_a_missing_bucket_is_not_a_missing_object(server: LookAlike, store: s3.S3Store) -> None:
    with pytest.raises(ObjectMissing):
        await store.head("a")
    server.faults = [answers(404, "x"), answers(404, "x")]  # HEAD has no body: both say only 404
    with pytest.raises(StoreError, match="there is no such bucket") as raised:
        await store.head("a")
    assert not isinstance(raised.value, ObjectMissing)


async def test_a_body_that_cannot_be_read_is_not_the_networks_fault(
    store: s3.S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = await asyncio.to_thread(collect, (b"x" * (1 << 20) for _ in range(65)))
    headers = store._headers(body)
    monkeypatch.setattr(store, "_headers", lambda _: headers)
    body.size += 1  # type: ignore[misc]  # as if the file had lost its last byte
    with pytest.raises(StoreError, match=r"a file of \d+ bytes ends after"):
        await store.put("a", body)
    body.close()
