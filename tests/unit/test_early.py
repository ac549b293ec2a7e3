"""The head start of scrypt: what it guesses, what it leaves alone, and that a guess is never more than that."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import scrypt
from pathlib import Path

import pytest

from infra import early
from infra.clock import SystemClock
from infra.keys import create_ring, open_keyring
from infra.ring import Policy, ring_name
from infra.storage.local import LocalStore
from infra.wraps import SCRYPT_N, SCRYPT_P, SCRYPT_R
from pipeline.errors import ConfigError
from tests.keys import SYSTEM_ID

SALT = b"s" * 32
#: A composed letter, as some keyboards give it in two code points.
TYPED, NORMAL = "se\u0301cret", "s\u00e9cret".encode()


def wrap(salt: bytes = SALT, n: int = SCRYPT_N) -> str:
    return f'{{"kind":"scrypt","n":{n},"r":{SCRYPT_R},"p":{SCRYPT_P},"salt":"{salt.hex()}","sealed":"00"}}'


def store_ring(folder: Path, *wraps: str, cluster: str = SYSTEM_ID, number: int = 1) -> None:
    """What looks like a ring to who only looks for a salt."""
    path = folder / cluster / ring_name(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(wraps), "utf-8")


def settings(folder: Path, **changed: str) -> dict[str, str]:
    return {"WALSHIP_DESTINATIONS": folder.as_uri(), "BACKUP_ENCRYPTION_PASSWORD": TYPED, **changed}


def begun() -> tuple[bytes, bytes] | None:
    """What is being calculated, which is thrown away."""
    guess, early._guess = early._guess, None
    return (guess.passphrase, guess.salt) if guess else None


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is calculated, unless the test takes that back; and there is no .env but the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(early._Guess, "start", lambda self: None)  # noqa: ARG005  it is a method


async def test_the_key_is_the_one_that_opens_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    store = LocalStore(tmp_path / SYSTEM_ID)
    (tmp_path / SYSTEM_ID).mkdir()
    await create_ring(store, SYSTEM_ID, TYPED, Policy(wal=True, base=True), SystemClock())
    assert early.begin(settings(tmp_path, BACKUP_ENCRYPTION_PASSWORD="wrong"))
    with pytest.raises(ConfigError, match="does not open the key ring"):
        await open_keyring(store, SYSTEM_ID, "wrong", clock=SystemClock())
    assert early.begin(settings(tmp_path))
    guess = early._guess
    assert guess is not None
    guess.join()
    assert guess.key == scrypt(NORMAL, salt=guess.salt, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P, maxmem=1 << 28, dklen=32)
    keys = await open_keyring(store, SYSTEM_ID, TYPED, clock=SystemClock())
    assert keys.ring is not None
    assert begun() is None, "it was taken, and is kept no longer"


@pytest.mark.parametrize(
    ("passphrase", "salt", "n"), [(b"another", SALT, SCRYPT_N), (NORMAL, b"t" * 32, SCRYPT_N), (NORMAL, SALT, 1024)]
)
def test_what_differs_is_not_taken_and_gone(tmp_path: Path, passphrase: bytes, salt: bytes, n: int) -> None:
    store_ring(tmp_path, wrap())
    assert early.begin(settings(tmp_path))
    assert early._guess is not None
    early._guess.key = b"k" * 32
    assert early.take(passphrase, salt, n, SCRYPT_R, SCRYPT_P) is None
    assert early._guess is None


def test_where_it_failed_whoever_asks_calculates(tmp_path: Path) -> None:
    store_ring(tmp_path, wrap())
    early.begin(settings(tmp_path))
    assert early._guess is not None
    early._guess.join = lambda timeout=None: None  # type: ignore[method-assign]  # noqa: ARG005  it was never started
    assert early.take(NORMAL, SALT, SCRYPT_N, SCRYPT_R, SCRYPT_P) is None


def test_the_newest_ring_counts(tmp_path: Path) -> None:
    store_ring(tmp_path, wrap(b"o" * 32))
    store_ring(tmp_path, wrap(), number=2)
    assert early.begin(settings(tmp_path))
    assert begun() == (NORMAL, SALT)


def test_settings_are_found_where_people_put_them(tmp_path: Path) -> None:
    store_ring(tmp_path, wrap())
    secret = tmp_path / "secret"
    secret.write_text(f"{TYPED}\n", "utf-8")
    folder = tmp_path.as_uri()
    for written in (TYPED, f"'{TYPED}'"):
        Path(".env").write_text(f"# x\nWALSHIP_DESTINATIONS={folder}\nBACKUP_ENCRYPTION_PASSWORD={written}\n", "utf-8")
        assert early.begin({})
        assert begun() == (NORMAL, SALT)
    assert early.begin({"BACKUP_ENCRYPTION_PASSWORD": "other"})  # the environment wins
    assert begun() == (b"other", SALT)
    Path(".env").unlink()
    assert early.begin({"WALSHIP_DESTINATIONS": folder, "BACKUP_ENCRYPTION_PASSWORD_FILE": str(secret)})
    assert begun() == (NORMAL, SALT)


@pytest.mark.parametrize(
    "changed",
    [
        {"BACKUP_ENCRYPTION_PASSWORD": ""},
        {"BACKUP_ENCRYPTION_PASSWORD": "\udcff"},
        {"BACKUP_ENCRYPTION_PASSWORD": "", "BACKUP_ENCRYPTION_PASSWORD_FILE": "absent"},
        {"WALSHIP_IDENTITY_FILE": "identity"},
        {"WALSHIP_DESTINATIONS": "s3://bucket/prefix"},
        {"WALSHIP_DESTINATIONS": "file:///absent"},
        {"WALSHIP_DESTINATIONS": "file:///a,file:///b"},
        {"WALSHIP_DESTINATIONS": ""},
    ],
)
def test_settings_that_say_something_else_begin_nothing(tmp_path: Path, changed: dict[str, str]) -> None:
    store_ring(tmp_path, wrap())
    assert not early.begin(settings(tmp_path, **changed))
    assert early._guess is None


@pytest.mark.parametrize("name", ["passphrase", ".env"])
def test_what_can_be_read_only_once_is_left_to_who_needs_it(tmp_path: Path, name: str) -> None:
    store_ring(tmp_path, wrap())
    os.mkfifo(tmp_path / name)
    pipe = os.open(tmp_path / name, os.O_RDWR)  # like ``<(pass show walship)``, written already
    try:
        os.write(pipe, b"BACKUP_ENCRYPTION_PASSWORD=a\n")
        assert not early.begin(settings(tmp_path, BACKUP_ENCRYPTION_PASSWORD="", BACKUP_ENCRYPTION_PASSWORD_FILE=name))
        assert os.read(pipe, 100) == b"BACKUP_ENCRYPTION_PASSWORD=a\n"
    finally:
        os.close(pipe)


def test_rings_that_are_not_plain_begin_nothing(tmp_path: Path) -> None:
    assert not early.begin(settings(tmp_path)), "no cluster"
    store_ring(tmp_path, wrap(n=1 << 18))
    assert not early.begin(settings(tmp_path)), "work that walship would not ask for"
    store_ring(tmp_path, wrap(), wrap(b"t" * 32))
    assert not early.begin(settings(tmp_path)), "several passphrases"
    store_ring(tmp_path, wrap())
    store_ring(tmp_path, wrap(), cluster="7")
    assert not early.begin(settings(tmp_path)), "several clusters"
    (tmp_path / "7" / ring_name(1)).unlink()
    (tmp_path / SYSTEM_ID / ring_name(1)).unlink()
    assert not early.begin(settings(tmp_path)), "no ring"


def test_it_is_there_before_what_takes_a_while_to_load() -> None:
    words = (
        "import infra.cli, sys; print(sorted({'click', 'psycopg', 'pydantic', 'infra.settings'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", words], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
