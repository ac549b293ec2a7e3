"""A server that lists versions as Amazon's does: by key, then the newest in front, objects and delete markers mixed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from aiohttp import web

from infra.storage.s3_client import S3Options
from tests.contract.lookalike import error


class Kept(NamedTuple):
    key: str
    version: str
    modified: datetime
    #: None: a delete marker.
    content: str | None


@dataclass
class Versions:
    """A bucket that can be read only."""

    kept: list[Kept] = field(default_factory=list)
    status: str = "Enabled"
    #: What is refused: first words of queries, like ``versioning``.
    refused: set[str] = field(default_factory=set)
    #: First word of each query, or the key.
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    @property
    def options(self) -> S3Options:
        return S3Options(bucket="bucket", endpoint=self.endpoint, access_key="me", secret_key="very-secret")

    def add(self, key: str, content: str | None, modified: datetime) -> None:
        """In front of what is there of the key."""
        at = next((n for n, other in enumerate(self.kept) if other.key >= key), len(self.kept))
        self.kept.insert(at, Kept(key, f"v{len(self.kept)}", modified, content))

    async def answer(self, request: web.Request) -> web.Response:
        query, key = request.query, request.match_info.get("key", "")
        what = next((word for word in ("versioning", "versions", "lifecycle", "object-lock") if word in query), "")
        self.asked.append(what or key)
        if what in self.refused:
            return error(403, "AccessDenied")
        if what == "versioning":
            status = f"<Status>{self.status}</Status>" if self.status else ""
            return _xml(f"<VersioningConfiguration>{status}</VersioningConfiguration>")
        if what == "versions":
            return _xml(self._page(query))
        if what:
            return error(501, "NotImplemented")
        found = next((v for v in self.kept if v.key == key and query.get("versionId", v.version) == v.version), None)
        if found is None or found.content is None:
            return error(404, "NoSuchKey")
        when = f"{found.modified:%a, %d %b %Y %H:%M:%S GMT}"
        return web.Response(text=found.content, headers={"ETag": '"e"', "Last-Modified": when})

    def _page(self, query: Mapping[str, str]) -> str:
        after, behind, most = query.get("key-marker", ""), query.get("version-id-marker", ""), int(query["max-keys"])
        begin = next((n for n, v in enumerate(self.kept) if v.key > after), len(self.kept))
        if behind:
            begin = 1 + next(n for n, v in enumerate(self.kept) if (v.key, v.version) == (after, behind))
        rest = [v for v in self.kept[begin:] if v.key.startswith(query.get("prefix", ""))]
        newest = {v.key: v.version for v in reversed(self.kept)}
        lines = "".join(_line(v, latest=newest[v.key] == v.version) for v in rest[:most])
        if not rest[most:]:
            return f"<ListVersionsResult><IsTruncated>false</IsTruncated>{lines}</ListVersionsResult>"
        last = rest[most - 1]
        return (
            "<ListVersionsResult><IsTruncated>true</IsTruncated>"
            f"<NextKeyMarker>{last.key}</NextKeyMarker><NextVersionIdMarker>{last.version}</NextVersionIdMarker>"
            f"{lines}</ListVersionsResult>"
        )


def _line(kept: Kept, *, latest: bool) -> str:
    kind = "DeleteMarker" if kept.content is None else "Version"
    size = "" if kept.content is None else f"<Size>{len(kept.content)}</Size>"
    return (
        f"<{kind}><Key>{kept.key}</Key><VersionId>{kept.version}</VersionId><IsLatest>{str(latest).lower()}</IsLatest>"
        f"<LastModified>{kept.modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>{size}</{kind}>"
    )


def _xml(text: str) -> web.Response:
    return web.Response(text=f"<?xml version='1.0'?>{text}", content_type="application/xml")


@asynccontextmanager
async def versions() -> AsyncIterator[Versions]:
    bucket = Versions()
    app = web.Application()
    app.router.add_get("/bucket", bucket.answer)
    app.router.add_get("/bucket/{key:.*}", bucket.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    bucket.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield bucket
    finally:
        await runner.cleanup()
