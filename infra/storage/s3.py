"""A store in an S3 bucket: Amazon's, SeaweedFS, or anything that speaks the same. Every object is one PUT.

Little is asked of the server: PutObject, GetObject (with Range), HeadObject, HeadBucket, ListObjectsV2, DeleteObject.
Deleting goes object by object: DeleteObjects needs checksums that look-alikes disagree about, and some do not have it.

A PUT in flight is protected by Content-MD5, which every server knows and which is signed with the request; Amazon also
demands it for object lock. ``checksums=when_supported`` sends x-amz-checksum-sha256 instead, where MD5 is not wanted.
"Create only if absent" is ``If-None-Match: *``. A server that was found to ignore it is asked first whether the object
is there: then two writers of one name within the same moment are not kept apart, and ``probe`` says so.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator, Collection, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from handlers.body import Collector
from infra.storage import s3_errors
from infra.storage.naming import check_key
from infra.storage.s3_client import CONNECTIONS, PIECE, STALL, S3Options, Upload, open_client, push
from pipeline.contracts import Abilities, Body, ObjectInfo, Span
from pipeline.errors import ConfigError, ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client
    from types_aiobotocore_s3.type_defs import GetObjectOutputTypeDef, GetObjectRequestTypeDef

#: Bodies above this size are collected in a thread, because they may spill to a file.
_IN_LOOP = 16 << 20
#: Bodies up to this size are hashed in the event loop: a hop to a thread takes as long, and on a busy machine longer.
_SMALL = 64 << 10


class S3Store:
    """See ``pipeline.contracts.Store``. Belongs to the event loop that first uses it."""

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._endpoint = options.endpoint or "Amazon S3"
        self._stack = contextlib.AsyncExitStack()
        self._client: S3Client | None = None
        self._opening = asyncio.Lock()
        #: False once the server was seen to ignore ``If-None-Match``, or to refuse it.
        self._conditional = True

    @property
    def name(self) -> str:
        return f"s3://{self._options.bucket}"

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        check_key(self.name, key)
        request = self._headers(body) if _is_small(body) else await asyncio.to_thread(self._headers, body)
        if keep_until is not None:
            request |= {"ObjectLockMode": self._options.lock, "ObjectLockRetainUntilDate": keep_until}
        if not replace and await self._put_if_absent(key, body, request):
            return
        if not replace:
            with contextlib.suppress(ObjectMissing):
                await self.head(key)
                raise s3_errors.conflict(self.name, key)
        await self._put(key, body, request)

    async def get(self, key: str, span: Span | None = None) -> Body:
        check_key(self.name, key)
        if span is not None and span[0] >= span[1]:
            await self.head(key)
            return MemoryBody(())
        return await self._get(key, span)

    async def _get(self, key: str, span: Span | None, *, version: str = "", before: datetime | None = None) -> Body:
        """The object, or one version of it. ``before``: ObjectMissing if it was written then or later."""
        request: GetObjectRequestTypeDef = {"Bucket": self._options.bucket, "Key": key}
        if version:
            request["VersionId"] = version
        if span is not None:
            request["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        client = await self._open()
        try:
            async with self._explained(f"get {key}", key), asyncio.timeout(STALL) as watch:
                answer = await client.get_object(**request)
                if before is not None and not _is_before(answer.get("LastModified"), before):
                    answer["Body"].close()
                    raise s3_errors.missing(self.name, key)
                return await self._read(key, span, answer, watch)
        except _BeyondEndError:
            return MemoryBody(())

    async def head(self, key: str) -> ObjectInfo:
        check_key(self.name, key)
        client = await self._open()
        try:
            async with self._explained(f"head {key}", key), asyncio.timeout(STALL):
                answer = await client.head_object(Bucket=self._options.bucket, Key=key)
        except ObjectMissing:
            # The answer to HEAD has no body that would tell a missing object from a missing bucket.
            async with self._explained("look at the bucket", ""), asyncio.timeout(STALL):
                await client.head_bucket(Bucket=self._options.bucket)
            raise
        return _info(key, answer["ContentLength"], answer.get("LastModified"))

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        client = await self._open()
        request: dict[str, Any] = {"Bucket": self._options.bucket, "Prefix": prefix}
        if after:
            request["StartAfter"] = start_before(after)
        if shallow:
            request["Delimiter"] = "/"
        while True:
            async with self._explained(f"list {prefix}", ""), asyncio.timeout(STALL):
                page = await client.list_objects_v2(**request)
            folders = [ObjectInfo(folder["Prefix"], 0) for folder in page.get("CommonPrefixes", ())]
            objects = [_info(o["Key"], o["Size"], o.get("LastModified")) for o in page.get("Contents", ())]
            for info in sorted(folders + objects, key=lambda info: info.key):
                # Servers disagree about folders that begin before ``after``; a folder's own marker is no object.
                if info.key > after and (not info.key.endswith("/") or shallow):
                    yield info
            if not page.get("IsTruncated"):
                return
            if not page.get("NextContinuationToken"):
                raise StoreError(f"{self.name} at {self._endpoint}: a listing of {prefix!r} is cut and cannot go on")
            request["ContinuationToken"] = page["NextContinuationToken"]

    async def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            check_key(self.name, key)
        client = await self._open()
        waiting = iter(dict.fromkeys(keys))

        async def work() -> None:
            for key in waiting:
                with contextlib.suppress(ObjectMissing):
                    async with self._explained(f"delete {key}", key), asyncio.timeout(STALL):
                        await client.delete_object(Bucket=self._options.bucket, Key=key)

        done = await asyncio.gather(*(work() for _ in range(min(CONNECTIONS, len(keys)))), return_exceptions=True)
        for error in done:
            if error is not None:
                raise error

    async def probe(self, key: str, body: Body) -> Abilities:
        check_key(self.name, key)
        self._conditional = True
        request = await asyncio.to_thread(self._headers, body)
        try:
            # The first may create it, where the caller was wrong; the second must be refused.
            tries = [await self._put_if_absent(key, body, request) for _ in range(2)]
        except ObjectConflict:
            return Abilities(conditional_put=True, remark="the store itself creates an object only if it is absent")
        self._conditional = False
        found = "ignores" if all(tries) else "refuses"
        return Abilities(
            conditional_put=False,
            remark=f"the store {found} If-None-Match: walship looks first whether an object is there,"
            " so two that write the same name in the same moment are not kept apart",
        )

    async def close(self) -> None:
        self._client = None
        await self._stack.aclose()

    async def _put_if_absent(self, key: str, body: Body, request: dict[str, Any]) -> bool:
        """Create the object in one step, or ObjectConflict. False if the server cannot do that."""
        if not self._conditional:
            return False
        try:
            await self._put(key, body, request | {"IfNoneMatch": "*"})
        except _UnknownToServerError:
            self._conditional = False
            return False
        return True

    async def _put(self, key: str, body: Body, request: dict[str, Any]) -> None:
        client = await self._open()
        until = request.get("ObjectLockRetainUntilDate")
        kept = f", kept until {until.isoformat()}" if until else ""
        async with self._explained(f"put {key} ({body.size} bytes{kept})", key), asyncio.timeout(STALL) as watch:
            upload: Any = Upload(body, watch)  # the stubs know only bytes and files
            try:
                answer = await client.put_object(Bucket=self._options.bucket, Key=key, Body=upload, **request)
            finally:
                if upload.failure is not None:
                    # Not the network's fault: the bytes could not be read here.
                    raise upload.failure
        if not answer.get("ETag"):
            raise StoreError(
                f"{self.name} at {self._endpoint}: put {key}: answered 200 without an ETag: it may not be stored",
                hint="a proxy between here and the store may answer in its place",
                passing=True,
            )

    async def _read(self, key: str, span: Span | None, answer: GetObjectOutputTypeDef, watch: asyncio.Timeout) -> Body:
        """The body of an answer, whole. Anything shorter is an error, and so is another range than was asked for."""
        collector = Collector()
        async with answer["Body"] as stream:
            wanted: int | None = answer.get("ContentLength")
            if span is not None:
                wanted = _ranged(answer.get("ContentRange", ""), span)
                if wanted is None:
                    raise StoreError(
                        f"{self.name} at {self._endpoint}: get {key}: asked for bytes {span[0]} to {span[1]},"
                        f" got {answer.get('ContentRange') or 'no range'}",
                        hint="the store does not honour Range",
                    )
            try:
                while piece := await stream.read(PIECE):
                    push(watch)
                    if collector.size < _IN_LOOP:
                        collector.add(piece)
                    else:
                        await asyncio.to_thread(collector.add, piece)
                if wanted is not None and collector.size != wanted:
                    raise StoreError(
                        f"{self.name} at {self._endpoint}: get {key}: {collector.size} of {wanted} bytes came",
                        passing=True,
                    )
            except BaseException:
                collector.discard()
                raise
        return collector.finish()

    def _headers(self, body: Body) -> dict[str, Any]:
        """What is sent along with every object. Reads the whole body: in a thread, if it is not small."""
        options = self._options
        request: dict[str, Any] = {}
        if options.checksums == "when_required":
            digest = hashlib.md5(usedforsecurity=False)
            name = "ContentMD5"
        else:
            digest = hashlib.sha256()
            name = "ChecksumSHA256"
        for chunk in body.chunks():
            digest.update(chunk)
        request[name] = base64.b64encode(digest.digest()).decode()
        if options.sse:
            request["ServerSideEncryption"] = options.sse
        if options.kms_key:
            request["SSEKMSKeyId"] = options.kms_key
        if options.storage_class:
            request["StorageClass"] = options.storage_class
        return request

    async def _open(self) -> S3Client:
        if self._client is not None:
            return self._client
        async with self._opening:
            if self._client is None:
                with self._as_config_error():
                    self._client = await self._stack.enter_async_context(open_client(self._options))
            return self._client

    @contextlib.contextmanager
    def _as_config_error(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (ValueError, OSError, BotoCoreError) as error:
            raise ConfigError(f"{self.name}: {error}", hint="check the options of the destination") from error

    @contextlib.asynccontextmanager
    async def _explained(self, what: str, key: str) -> AsyncIterator[None]:
        """Turn what the client raises into our own errors."""
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if key and code in {"NoSuchKey", "404", "NotFound"}:
                raise s3_errors.missing(self.name, key) from None
            if key and (code == "PreconditionFailed" or status == 412):
                raise s3_errors.conflict(self.name, key) from None
            if code == "InvalidRange" or status == 416:
                raise _BeyondEndError from None
            if code == "NotImplemented" or status == 501:
                raise _UnknownToServerError(f"{self.name} at {self._endpoint}: {what}: {code}") from None
            if code == "404":
                code = error.response["Error"]["Code"] = "NoSuchBucket"
            raise s3_errors.refused(self.name, self._endpoint, what, error) from error
        except (BotoCoreError, aiohttp.ClientError, OSError) as error:
            raise s3_errors.unreachable(self.name, self._endpoint, what, error) from error


class _BeyondEndError(Exception):
    """The span begins behind the object's last byte."""


class _UnknownToServerError(StoreError):
    """The server does not know an operation, or one of its headers."""


def _is_small(body: Body) -> bool:
    return isinstance(body, MemoryBody) and body.size <= _SMALL


def _is_before(modified: datetime | None, moment: datetime) -> bool:
    return modified is not None and modified < moment


def start_before(after: str) -> str:
    """A key to start a listing from that leaves out nothing behind ``after``, also where the server sorts by folders.

    SeaweedFS does: it takes folder "a" for less than "a.b" and than "a" itself, but its keys, "a/…", sort behind both.
    """
    parts = after.rstrip("/").split("/")
    for depth, part in enumerate(parts):
        ends = [at for at in range(1, len(part)) if part[at] < "/"]
        if depth == len(parts) - 1:
            ends.append(len(part))
        if ends:
            return "/".join([*parts[:depth], part[: max(0, ends[0] - 1)]])
    return after


def _info(key: str, size: int, modified: datetime | None) -> ObjectInfo:
    return ObjectInfo(key, size, modified and modified.astimezone(UTC))


def _ranged(header: str, span: Span) -> int | None:
    """Bytes to come according to ``Content-Range: bytes 0-9/100``; None if that is not the span, cut at the end."""
    try:
        place, total = header.removeprefix("bytes ").split("/")
        first, last = (int(digits) for digits in place.split("-"))
        end = min(span[1], int(total))
    except ValueError:
        return None
    return end - span[0] if (first, last) == (span[0], end - 1) else None
