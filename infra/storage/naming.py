"""What may be the key of an object. The same for every store, so that a repository can be copied from any to any."""

from __future__ import annotations

import re

from pipeline.errors import StoreError

#: Names of files that a local store is still writing. No object may be called so, so none is ever taken for one.
TEMPORARY = re.compile(r"\.walship-[0-9a-f]{32}\.tmp")


def check_key(store: str, key: str) -> None:
    """Refuse, as a StoreError, a key that would leave the store's folder or that some store could not hold."""
    parts = key.split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise StoreError(f"{key!r} cannot be a key in {store}: it is absolute, or has an empty, '.' or '..' component")
    if any(ord(letter) < 0x20 or letter == "\x7f" for letter in key):
        raise StoreError(f"{key!r} cannot be a key in {store}: it holds control characters")
    if any(TEMPORARY.fullmatch(part) for part in parts):
        raise StoreError(f"{key!r} cannot be a key in {store}: such names are kept for unfinished files")
