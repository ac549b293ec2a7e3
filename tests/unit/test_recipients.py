"""Keys as people type them, the files they lie in, and what is said of each that is wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from infra.at_hand import AtHand, look_at_hand, refuse_placeholder, weakness
from infra.cli.group import cli
from infra.recipients import make_identity, parse_identity, parse_recipient, read_secret, show_recipient
from infra.ring import Policy, fresh_ring
from infra.sealing import public_of
from infra.settings import Settings
from infra.writer_file import decode_writer, encode_writer
from pipeline.errors import ConfigError
from tests.clock import FastClock
from tests.keys import SYSTEM_ID

PUBLIC = X25519PrivateKey.generate().public_key().public_bytes_raw()
SHOWN = show_recipient(PUBLIC)
CLOCK = FastClock()


def test_a_public_key_as_text_and_back() -> None:
    assert SHOWN.startswith("walship-recipient-1-")
    assert len(SHOWN) == 78
    assert parse_recipient(SHOWN) == parse_recipient(f" {SHOWN.upper()}\n") == PUBLIC


def test_every_mistyped_letter_is_noticed() -> None:
    for place in range(len(SHOWN)):
        other = "b" if SHOWN[place] == "a" else "a"
        with pytest.raises(ConfigError, match="the recipient's public key"):
            parse_recipient(SHOWN[:place] + other + SHOWN[place + 1 :])
        with pytest.raises(ConfigError):
            parse_recipient(SHOWN[:place] + SHOWN[place + 1 :])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not begin with walship-recipient-1-"),
        ("age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p", "does not begin with"),
        (SHOWN.replace("-1-", "-2-"), "is of a form that this walship does not know"),
        (SHOWN[:-1] + "1", "it is cut, or has other characters"),
    ],
    ids=["nothing", "age's", "a newer form", "cut"],  # the key is another one in each process that runs tests
)
def test_what_is_no_public_key(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_recipient(text)


def test_a_private_key_in_the_place_of_a_public_one_is_not_shown(tmp_path: Path) -> None:
    make_identity(tmp_path / "key", CLOCK.now())
    private = (tmp_path / "key").read_text().splitlines()[-1]
    with pytest.raises(ConfigError, match="that is a private key") as error:
        parse_recipient(private)
    assert private[30:50] not in error.value.fact + error.value.hint


def test_an_identity_file_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "restore.key"
    old = os.umask(0)
    try:
        public = make_identity(path, CLOCK.now())
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert public_of(parse_identity(text, str(path))) == public
    assert show_recipient(public) in text
    with pytest.raises(ConfigError, match="is there already, and is not overwritten"):
        make_identity(path, CLOCK.now())
    assert path.read_text() == text
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        make_identity(tmp_path / "no" / "folder", CLOCK.now())


def test_the_command_prints_the_public_key_and_never_the_private_one(tmp_path: Path) -> None:
    path = tmp_path / "restore.key"
    done = CliRunner().invoke(cli, ["key", "new-identity", str(path)])
    assert done.exit_code == 0, done.output
    assert parse_recipient(done.stdout) == public_of(parse_identity(path.read_text(), ""))
    assert "walship-identity-1-" not in done.output


@pytest.mark.parametrize("text", ["", "# nothing\n", "walship-recipient-1-abc\n", "{}\n"])
def test_what_is_no_identity_file(text: str) -> None:
    with pytest.raises(ConfigError, match="my key is no identity file"):
        parse_identity(text, "my key")


def test_a_damaged_identity_file_is_told_without_its_content(tmp_path: Path) -> None:
    make_identity(tmp_path / "key", CLOCK.now())
    line = (tmp_path / "key").read_text().splitlines()[-1]
    broken = line[:40] + ("b" if line[40] == "a" else "a") + line[41:]
    with pytest.raises(ConfigError, match=r"the private key in my.key is mistyped: its checksum") as error:
        parse_identity(broken, "my.key")
    assert broken[25:60] not in error.value.fact + error.value.hint


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o400, False), (0o644, True), (0o660, True)])
def test_a_secret_that_others_may_read_is_warned_of(tmp_path: Path, mode: int, told: bool) -> None:
    path = tmp_path / "a secret"
    path.write_text("text")
    path.chmod(mode)
    said: list[str] = []
    assert read_secret(path, "WALSHIP_IDENTITY_FILE", lambda fact, hint: said.append(fact + hint)) == "text"
    warning = f"WALSHIP_IDENTITY_FILE: {path} has mode {mode:04o}: others on this host may read itchmod 600 '{path}'"
    assert said == ([warning] if told else [])


def test_a_secret_that_cannot_be_read(tmp_path: Path) -> None:
    def hear(fact: str, hint: str) -> None:
        raise AssertionError(fact + hint)

    with pytest.raises(ConfigError, match=r"WALSHIP_IDENTITY_FILE: .* cannot be read: No such file"):
        read_secret(tmp_path / "not there", "WALSHIP_IDENTITY_FILE", hear)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_secret(tmp_path, "WALSHIP_IDENTITY_FILE", hear)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read_secret(tmp_path / "binary", "WALSHIP_IDENTITY_FILE", hear)
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    with pytest.raises(ConfigError, match="it is another file"):
        read_secret(tmp_path / "large", "WALSHIP_IDENTITY_FILE", hear)


def test_what_is_at_hand(tmp_path: Path) -> None:
    identity, writer = tmp_path / "identity", tmp_path / "writer"
    make_identity(identity, CLOCK.now())
    ring = fresh_ring(SYSTEM_ID, Policy(wal=True, base=True))
    writer.write_text(encode_writer(ring.writer))
    writer.chmod(0o600)
    alone = look_at_hand(Settings(BACKUP_ENCRYPTION_ENABLED=True, WALSHIP_WRITER_FILE=str(writer)))
    assert alone == AtHand(writer=ring.writer)
    assert not alone.reads
    both = look_at_hand(Settings(WALSHIP_IDENTITY_FILE=str(identity), WALSHIP_WRITER_FILE=str(writer)))
    assert (both.reads, both.writer) == (True, None), "whoever can read needs no file to write"
    for shown in map(repr, (alone, both)):
        assert ring.writer_secret.hex() not in shown
        assert repr(both.identity) not in shown
        assert "secret=" not in shown


def test_encryption_needs_something_at_hand() -> None:
    with pytest.raises(ValueError, match=r"BACKUP_ENCRYPTION_PASSWORD \(or its _FILE\) is empty, as are"):
        Settings(BACKUP_ENCRYPTION_ENABLED=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"walship_writer": 1', '"walship_writer": 2'), "is of format 2; this walship reads format 1"),
        (('"ring": 1', '"ring": "1"'), "ring is not int"),
        (('"wal": true', '"wal": 1'), "wal is not bool"),
        (("{", "["), "is no writer file"),
        (('"writer_secret"', '"former_secret"'), "unknown or missing members"),
    ],
)
def test_what_is_no_writer_file(change: tuple[str, str], said: str) -> None:
    ring = fresh_ring(SYSTEM_ID, Policy(wal=True, base=True))
    text = encode_writer(ring.writer).replace(*change, 1)
    with pytest.raises(ConfigError, match=f"^w.json .*{said}") as error:
        decode_writer(text, "w.json")
    assert ring.writer_secret.hex() not in error.value.fact + error.value.hint


def test_a_writer_file_holds_no_private_key() -> None:
    ring = fresh_ring(SYSTEM_ID, Policy(wal=True, base=False))
    text = encode_writer(ring.writer)
    assert ring.private_key.hex() not in text
    assert decode_writer(text, "w.json") == ring.writer


def test_short_passphrases_are_warned_of() -> None:
    assert weakness("") is None
    assert weakness("twelve chars") is None
    fact, hint = weakness("hunter2") or ("", "")
    assert "has 7 characters" in fact
    assert "hunter2" not in fact + hint


@pytest.mark.parametrize(
    "passphrase", ["...", "…", "******", "xxxxxxxxxxxxxxxx", "<passphrase>", "ChangeMe", "abc", "é"]
)
def test_a_placeholder_is_no_passphrase(passphrase: str) -> None:
    with pytest.raises(ConfigError, match="is a placeholder") as raised:
        refuse_placeholder(passphrase)
    assert passphrase not in raised.value.fact.removeprefix("BACKUP_ENCRYPTION_PASSWORD")


@pytest.mark.parametrize("passphrase", ["", "hunter2", "....a", "change me now", "x-ray", "åäöü"])
def test_what_may_be_meant_is_let_in(passphrase: str) -> None:
    refuse_placeholder(passphrase)


@pytest.mark.parametrize("content", ["", "\n", "  \n"])
def test_an_empty_passphrase_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "passphrase"
    path.write_text(content)
    path.chmod(0o600)
    done = CliRunner().invoke(cli, ["key", "add", "--passphrase-file", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.fact == f"--passphrase-file: {path} holds no passphrase: it is empty"


@pytest.mark.parametrize("words", [["add"], ["rotate"], ["rotate", "--new-repository-key"]])
def test_a_placeholder_becomes_no_passphrase_of_a_repository(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "passphrase"
    path.write_text("...\n")
    path.chmod(0o600)
    done = CliRunner().invoke(cli, ["key", *words, "--passphrase-file", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.fact == f"the passphrase in {path} is a placeholder, or too short: 3 characters"
    assert "12 or more" in done.exception.hint


def test_a_placeholder_that_is_one_already_can_be_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "passphrase"
    path.write_text("...\n")
    path.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WALSHIP_DESTINATIONS", raising=False)
    done = CliRunner().invoke(cli, ["key", "remove", "--passphrase-file", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert "WALSHIP_DESTINATIONS is not set" in done.exception.fact, "it got as far as the repository"


@pytest.mark.parametrize("words", [["add"], ["remove"], ["add", "--passphrase-file", "f", "--recipient", SHOWN]])
def test_one_of_the_two_is_given(words: list[str]) -> None:
    done = CliRunner().invoke(cli, ["key", *words])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.fact == "give one of --passphrase-file and --recipient"
