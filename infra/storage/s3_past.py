"""A bucket as it was at a moment.

A key shows its newest version of before the moment's second; nothing, if that is a delete marker. Times are those of
the store, which tells whole seconds: so nothing is seen that was written at the moment or after it, and what was
written within the second before may be lacking. Nothing can be written: there is only one present.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime

from infra.storage import s3_errors
from infra.storage.naming import check_key
from infra.storage.s3 import start_before
from infra.storage.s3_client import S3Options
from infra.storage.s3_versions import PAGE, Page, S3Versions, Version
from pipeline.contracts import Abilities, Body, ObjectInfo, Span
from pipeline.errors import ObjectMissing, ReadOnly
from pipeline.objects import MemoryBody


class S3Past(S3Versions):
    """See ``pipeline.contracts.Store``; ``put``, ``delete`` and ``probe`` raise ReadOnly."""

    def __init__(self, options: S3Options, moment: datetime) -> None:
        super().__init__(options)
        #: Versions that a listing asks for at a time.
        self.page = PAGE
        #: What was written in this second or later is not seen.
        self._end = moment.astimezone(UTC).replace(microsecond=0)

    @property
    def name(self) -> str:
        return f"{super().name} as of {self._end:%Y-%m-%dT%H:%M:%SZ}"

    async def get(self, key: str, span: Span | None = None) -> Body:
        check_key(self.name, key)
        if span is not None and span[0] >= span[1]:
            await self.head(key)
            return MemoryBody(())
        try:
            # Most objects never change: one question, and not two.
            return await self._get(key, span, before=self._end)
        except ObjectMissing:
            then = await self._then(key)
            return await self._get(key, span, version=then.id)

    async def head(self, key: str) -> ObjectInfo:
        check_key(self.name, key)
        then = await self._then(key)
        return ObjectInfo(key, then.size, then.modified)

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        found: dict[str, Version] = {}
        ends: set[str] = set()  # last keys of pages, and those that were asked for by themselves
        begin = start_before(after) if after else ""
        async for page in self.pages(prefix, after=begin, shallow=shallow, size=self.page):
            for version in page.versions:
                self._see(found, version)
            for key in _passed_over(page):
                if key.startswith(prefix) and key not in ends:
                    ends.add(key)
                    for version in await self._versions(key):
                        self._see(found, version)
            ends.add(page.key)
            unsure = found.pop(page.key, None)  # of the last key there may be more on the next page
            there = [ObjectInfo(then.key, then.size, then.modified) for then in found.values() if then.id]
            there += [ObjectInfo(folder, 0) for folder in page.folders]
            for info in sorted(there, key=lambda info: info.key):
                if info.key > after and (not info.key.endswith("/") or shallow):
                    yield info
            found = {unsure.key: unsure} if unsure is not None else {}

    async def put(self, key: str, *_: object, **_options: object) -> None:
        raise self._refusal(f"put {key}")

    async def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            raise self._refusal(f"delete {key}")

    async def probe(self, key: str, *_: object) -> Abilities:
        raise self._refusal(f"probe {key}")

    def _see(self, found: dict[str, Version], version: Version) -> None:
        """The newest of each key; of two that are equal, the one that was listed first."""
        if version.modified < self._end and (version.key not in found or version.rank > found[version.key].rank):
            found[version.key] = version

    async def _then(self, key: str) -> Version:
        """The version of a key that is seen. Raises ObjectMissing."""
        found: dict[str, Version] = {}
        for version in await self._versions(key):
            self._see(found, version)
        if key not in found or not found[key].id:
            raise s3_errors.missing(self.name, key)
        return found[key]

    async def _versions(self, key: str) -> Sequence[Version]:
        """The versions of one key, the newest in front, back to where one is seen and those behind it are older."""
        versions = list[Version]()
        async for page in self.pages(key):
            versions += [version for version in page.versions if version.key == key]
            if len({version.modified for version in versions if version.modified < self._end}) > 1:
                break
        return versions

    def _refusal(self, what: str) -> ReadOnly:
        hint = "leave out --as-of, or as_of= of the destination, to write there"
        return ReadOnly(f"{self.name}: {what}: the past cannot be changed", hint=hint)


def _passed_over(page: Page) -> list[str]:
    """Keys of which SeaweedFS may tell nothing on the next page, nor on this one, since it goes by another order.

    It keeps the versions of A below "A.versions", so "A.partial" comes before A; and what was there before the bucket
    had versions lies at A itself, apart from the later ones. The next page begins behind this one's last *key*.
    """
    folder, slash, name = page.key.rpartition("/")
    stem = f"{folder}{slash}{name.partition('.')[0]}"
    unsure = stem != page.key or page.version == "null"
    return [stem] if unsure and name and not name.startswith(".") else []
