"""Reading a bucket as it was at a moment. Which destinations can be, and the option ``as_of`` of their URLs.

A destination with ``as_of=2026-11-23T12:00:00Z`` among its options is the bucket as it was before that second: see
``s3_past``. Being an option of the URL, it goes wherever the URL goes, also into what a restored server fetches by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import urlsplit

from infra.settings import Settings
from infra.storage import display_name, is_past, open_versions
from pipeline.errors import ConfigError, StoreError
from pipeline.moments import show

_HINT = (
    "only a bucket with versions can be seen as it was (docs/ransomware.md); an earlier moment of the database is"
    " --to-time, without --as-of"
)


def at_moment(url: str, moment: datetime) -> str:
    """The URL of an ``s3:`` destination as it was at the moment, to the second."""
    return f"{url}{'&' if urlsplit(url).query else '?'}as_of={moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


async def as_it_was(
    urls: tuple[str, ...], moment: datetime, settings: Settings, *, tell: Callable[[str], None]
) -> tuple[str, ...]:
    """URLs of the destinations as they were at the moment. Those that keep no versions are left out, and told.

    One that does not answer stays: it is told of when it is opened. Raises ConfigError if none can be read so.
    """
    if moment > datetime.now(UTC):
        raise ConfigError(f"--as-of {show(moment)} lies in the future", hint="name a moment before the mishap")
    answers = await asyncio.gather(*(_versions(url, settings) for url in urls))
    kept = [(url, words) for url, words, lacks in answers if not lacks]
    lacking = [f"{display_name(url)} ({lacks})" for url, _, lacks in answers if lacks]
    if not kept:
        raise ConfigError(f"keeps no versions: {', '.join(lacking)}", hint=_HINT)
    for each in lacking:
        tell(f"left out, because it keeps no versions: {each}")
    for url, words in kept:
        tell(f"reading {display_name(url)} as it was before {show(moment.replace(microsecond=0))}{words}")
    return tuple(at_moment(url, moment) for url, _ in kept)


async def _versions(url: str, settings: Settings) -> tuple[str, str, str]:
    """The URL, what should be known of its versions, and why it has none; both empty if all is well."""
    if urlsplit(url).scheme != "s3":
        return url, "", "a folder"
    if is_past(url):
        raise ConfigError(f"{display_name(url)} says already as of when", hint="leave out --as-of, or that")
    store, _ = open_versions(url, settings)
    try:
        status = await store.versioning()
    except StoreError as error:
        return url, f"; whether it keeps versions is not known: {error.fact}", ""
    finally:
        await store.close()
    if status == "Suspended":
        return url, "; its versions are suspended: what was replaced since they were is lost", ""
    return url, "", "" if status == "Enabled" else "versions were never enabled for the bucket"
