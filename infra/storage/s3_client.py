"""How a bucket is reached: the options, the client, and a body on its way out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.contracts import Body
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from types_aiobotocore_s3.client import S3Client

#: Seconds for a connection to be made.
_CONNECT = 5.0
#: Seconds without a byte in either direction after which a request is given up.
STALL = 15.0
#: Connections at once, and how many objects are deleted at once.
CONNECTIONS = 16
#: Bytes that are sent or received in one go.
PIECE = 256 << 10


@dataclass(frozen=True, slots=True)
class S3Options:
    """How a bucket is reached. All but the bucket may be left out."""

    bucket: str
    #: ``http://host:port``; None is Amazon.
    endpoint: str | None = None
    region: str | None = None
    #: Bucket in the path instead of the host name; None: if there is an endpoint.
    path_style: bool | None = None
    checksums: Literal["when_required", "when_supported"] = "when_required"
    #: File with the certificates to trust; None: AWS_CA_BUNDLE, or those of the system.
    ca: str | None = None
    #: Server-side encryption: AES256 or aws:kms.
    sse: str | None = None
    kms_key: str | None = None
    storage_class: str | None = None
    #: Object lock mode of what is stored with ``keep_until``.
    lock: Literal["GOVERNANCE", "COMPLIANCE"] = "GOVERNANCE"
    #: Empty: wherever botocore finds credentials (environment, shared files, roles).
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)


class Upload:
    """A body as botocore and aiohttp take it: sent piece by piece, each read from a file in a thread."""

    def __init__(self, body: Body, watch: asyncio.Timeout) -> None:
        self._body = body
        self._watch = watch
        self.failure: StoreError | None = None

    def __len__(self) -> int:
        return self._body.size

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        chunks = self._body.chunks()
        while True:
            try:
                chunk = next(chunks, None) if isinstance(self._body, MemoryBody) else await _next(chunks)
            except (StoreError, OSError) as error:
                self.failure = error if isinstance(error, StoreError) else StoreError(str(error), passing=True)
                raise
            if chunk is None:
                return
            view = memoryview(chunk)
            for start in range(0, len(view), PIECE):
                push(self._watch)
                yield view[start : start + PIECE]

    def read(self, size: int = -1) -> bytes:
        """Only here because botocore takes what has it for a body."""
        raise NotImplementedError(f"read({size})")

    def seek(self, position: int) -> int:
        """Each iteration begins at the front anyway."""
        return position


async def _next(chunks: Iterator[bytes]) -> bytes | None:
    return await asyncio.to_thread(next, chunks, None)


def push(watch: asyncio.Timeout) -> None:
    """Something moved: from now on another ``STALL`` seconds."""
    watch.reschedule(asyncio.get_running_loop().time() + STALL)


def open_client(options: S3Options) -> contextlib.AbstractAsyncContextManager[S3Client]:
    """A client that tries once and does not meddle with checksums."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    path_style = bool(options.endpoint) if options.path_style is None else options.path_style
    config = AioConfig(
        connect_timeout=_CONNECT,
        read_timeout=STALL,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},  # patience is in Retrying
        request_checksum_calculation=options.checksums,
        response_checksum_validation=options.checksums,
        # Not signed over the payload, which would be hashed once more and in the event loop; its digest is signed.
        s3={"addressing_style": "path" if path_style else "auto", "payload_signing_enabled": False},
        warm_up_loader_caches=True,
    )
    session = get_session()
    # A round trip more for each object, and servers that do not know it would let us wait.
    session.register("before-send.s3.PutObject", _expect_nothing, unique_id="walship-no-expect")
    return session.create_client(
        "s3",
        region_name=options.region or ("us-east-1" if options.endpoint else None),
        endpoint_url=options.endpoint,
        verify=options.ca,
        aws_access_key_id=options.access_key or None,
        aws_secret_access_key=options.secret_key or None,
        aws_session_token=options.session_token or None,
        config=config,
    )


def _expect_nothing(request: AWSPreparedRequest, **_: Any) -> None:
    if "Expect" in request.headers:  # not among what is signed
        del request.headers["Expect"]
