"""scrypt, begun while the rest of the command is still being imported: a quarter of a second on another core.

It is a guess, and only ever a head start: what the settings and the store will say is looked for by the shortest way,
and whoever opens the ring takes the result only if passphrase, salt and costs are exactly his. A wrong guess, or none,
costs the user nothing but that head start. Standard library only: it has to be there before anything else is.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

#: What a passphrase's wrap costs in every ring that walship makes. Nobody has authenticated the ring yet: one that asks
#: for other work is not for this module.
N, R, P = 1 << 16, 8, 2
#: The one wrap of a ring, as ``sealing.as_json`` writes it.
_WRAP = re.compile(rb'"kind":"scrypt","n":%d,"r":%d,"p":%d,"salt":"([0-9a-f]{64})"' % (N, R, P))
_RING = re.compile(r"ring-\d{8}")
#: Bytes of a ring, and of ``.env`` and of a file with the passphrase, that are looked at.
_MOST = 1 << 20
_NAMES = ("BACKUP_ENCRYPTION_PASSWORD", "BACKUP_ENCRYPTION_PASSWORD_FILE", "WALSHIP_DESTINATIONS",
          "WALSHIP_IDENTITY_FILE")  # fmt: skip
#: A line of ``.env`` that means what it looks like; others are left to who reads it for good.
_LINE = re.compile(r"\s*(?:export\s+)?([A-Z_]+)=([^\s'\"#\\]*|'[^'\\]*')\s*")


class _Guess(threading.Thread):
    """One scrypt under way."""

    def __init__(self, passphrase: bytes, salt: bytes) -> None:
        super().__init__(name="scrypt", daemon=True)
        self.passphrase, self.salt = passphrase, salt
        self.key = b""

    def run(self) -> None:
        try:
            from hashlib import scrypt  # not in every build of Python

            self.key = scrypt(self.passphrase, salt=self.salt, n=N, r=R, p=P, maxmem=256 * N * R, dklen=32)
        except (ImportError, ValueError, MemoryError):
            self.key = b""


_guess: _Guess | None = None


def begin(environment: Mapping[str, str] | None = None) -> bool:
    """Begin, if it is plain what will be asked for: one folder, one cluster in it, one passphrase. Whether it did."""
    global _guess  # noqa: PLW0603  one process opens one ring
    try:
        found = _look(os.environ if environment is None else environment)
    except (OSError, ValueError):  # told by who reads the same for good
        found = None
    _guess = _Guess(*found) if found else None
    if _guess is not None:
        _guess.start()
    return _guess is not None


def take(passphrase: bytes, salt: bytes, n: int, r: int, p: int) -> bytes | None:
    """The key, 32 bytes, if just this was begun, after waiting for it. None: calculate it yourself. Kept no longer."""
    global _guess
    guess, _guess = _guess, None
    if guess is None or (guess.passphrase, guess.salt, N, R, P) != (passphrase, salt, n, r, p):
        return None
    guess.join()
    return guess.key or None


def _look(environment: Mapping[str, str]) -> tuple[bytes, bytes] | None:
    """Passphrase and salt, or None. Raises OSError, ValueError."""
    given = _written(Path(".env")) | {name: environment[name] for name in _NAMES if environment.get(name)}
    passphrase, path = given.get(_NAMES[0], ""), given.get(_NAMES[1], "")
    if path and not passphrase:
        passphrase = _text(Path(path)).rstrip("\r\n")
    url = given.get("WALSHIP_DESTINATIONS", "")
    if not passphrase or given.get("WALSHIP_IDENTITY_FILE") or not url.startswith("file:///") or "," in url:
        return None
    clusters = [entry for entry in os.scandir(unquote(url.removeprefix("file://"))) if entry.name.isdigit()]
    if len(clusters) != 1:
        return None
    keys = Path(clusters[0].path) / "keys"
    ring = max(name for name in os.listdir(keys) if _RING.fullmatch(name))  # noqa: PTH208  names are all it takes
    with (keys / ring).open("rb") as file:
        salts = _WRAP.findall(file.read(_MOST))
    if len(salts) != 1:  # which of several passphrases it is, only trying tells
        return None
    return unicodedata.normalize("NFC", passphrase).encode(), bytes.fromhex(salts[0].decode())


def _written(path: Path) -> dict[str, str]:
    """The plain lines of ``.env``."""
    try:
        lines = _text(path).splitlines()
    except FileNotFoundError:
        return {}
    matches = filter(None, map(_LINE.fullmatch, lines))
    return {match[1]: match[2].strip("'") for match in matches if match[1] in _NAMES and match[2]}


def _text(path: Path) -> str:
    """Raises ValueError for a pipe, such as ``<(pass show walship)``: it can be read only once, and not by a guess."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(path)
    with path.open("rb") as file:
        return file.read(_MOST).decode()
