"""Where settings come from: the environment, ``.env``, and files that hold secrets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from infra.settings import SECRETS, Settings, known_names, load, secret_files
from pipeline.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and an environment without settings."""
    for name in known_names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def give(place: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "environment":
        monkeypatch.setenv(name, value)
    else:
        with Path(".env").open("a", encoding="utf-8") as file:
            file.write(f"{name}={value}\n")


def secret_of(settings: Settings, name: str) -> str:
    secret = getattr(settings, name.lower())
    assert isinstance(secret, SecretStr)
    return secret.get_secret_value()


@pytest.mark.parametrize("place", ["environment", ".env"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_read_from_its_file(name: str, place: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "secret").write_text("correct horse\n", "utf-8")
    give(place, f"{name}_FILE", "secret", monkeypatch)
    assert secret_of(load(), name) == "correct horse"
    assert secret_files() == {name: home / "secret"}


@pytest.mark.parametrize("place", ["environment", ".env"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_read_itself(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give(place, name, "battery staple", monkeypatch)
    give(place, f"{name}_FILE", "", monkeypatch)  # as in an example that was uncommented and not filled in
    assert secret_of(load(), name) == "battery staple"
    assert secret_files() == {}


@pytest.mark.parametrize("places", [(a, b) for a in ("environment", ".env") for b in ("environment", ".env")])
@pytest.mark.parametrize("name", SECRETS)
def test_both_forms_at_once_contradict_each_other(
    name: str, places: tuple[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "secret").write_text("correct horse", "utf-8")
    give(places[0], name, "battery staple", monkeypatch)
    give(places[1], f"{name}_FILE", str(home / "secret"), monkeypatch)
    with pytest.raises(ConfigError, match=f"{name} and {name}_FILE are both set") as raised:
        load()
    assert raised.value.hint == "keep one of them"


def test_the_environment_wins_over_the_file_unless_it_is_empty(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "old").write_text("old", "utf-8")
    (home / "new").write_text("new", "utf-8")
    give(".env", "POSTGRES_PASSWORD_FILE", "old", monkeypatch)
    monkeypatch.setenv("POSTGRES_PASSWORD_FILE", "")
    assert secret_of(load(), "POSTGRES_PASSWORD") == "old"
    monkeypatch.setenv("POSTGRES_PASSWORD_FILE", "new")
    assert secret_of(load(), "POSTGRES_PASSWORD") == "new"


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file or directory"), (b"correct \xff horse", "it is not UTF-8 text")]
)
def test_a_file_that_cannot_be_read_is_named_and_not_shown(content: bytes | None, said: str, home: Path) -> None:
    if content is not None:
        (home / "secret").write_bytes(content)
    Path(".env").write_text("AWS_ACCESS_KEY_ID_FILE=secret\n", "utf-8")
    with pytest.raises(ConfigError) as raised:
        load()
    assert raised.value.fact == f"AWS_ACCESS_KEY_ID_FILE: {home / 'secret'} cannot be read: {said}"
    assert "readable for the user that runs walship" in raised.value.hint


def test_another_file_can_stand_for_dotenv(home: Path) -> None:
    """And then ``.env`` counts for nothing, unknown names included."""
    (home / ".env").write_text("WALSHIP_SPOLDIR=/x\nPOSTGRES_PORT=1\n", "utf-8")
    (home / "other").write_text("POSTGRES_PASSWORD_FILE=secret\n", "utf-8")
    (home / "secret").write_text("correct horse", "utf-8")
    settings = load(home / "other")
    assert (settings.postgres_port, secret_of(settings, "POSTGRES_PASSWORD")) == ("5432", "correct horse")
    with pytest.raises(ConfigError, match="there is no setting WALSHIP_SPOLDIR") as raised:
        load()
    assert raised.value.hint == "did you mean WALSHIP_SPOOL_DIR?"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Tr0ub${HOME}4dor", "Tr0ub${HOME}4dor"),
        ("$POSTGRES_HOST", "$POSTGRES_HOST"),
        (r"'correct # ho\'rse $x'", "correct # ho'rse $x"),
    ],
)
def test_a_passphrase_in_dotenv_is_taken_word_for_word(written: str, meant: str) -> None:
    Path(".env").write_text(f"BACKUP_ENCRYPTION_PASSWORD={written}\n", "utf-8")
    assert load().passphrase == meant


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"POSTGRES_PORT=1\n\n\nPOSTGRES_PASSWORD='open\n", "line 4 of .env is not NAME=value"),
        (b"POSTGRES_PORT=1\nPOSTGRES_PASSWORD geheim\n", "line 2 of .env is not NAME=value"),
        (b"POSTGRES_HOST\n", "line 1 of .env is not NAME=value"),
        (b"POSTGRES_PASSWORD=\xff\n", ".env is not UTF-8 text"),
    ],
)
def test_a_dotenv_that_cannot_be_read_is_refused(content: bytes, said: str) -> None:
    Path(".env").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load()
    assert raised.value.fact == said


@pytest.mark.parametrize("written", ["correct horse # staple", "correct\t#horse", " # of the safe", "co'rrect #"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_without_quotes_is_not_cut_off_at_a_sign(name: str, written: str) -> None:
    Path(".env").write_text(f"WALSHIP_SLOT=a # a comment\n\nexport {name}={written}\n", "utf-8")
    for read in (load, secret_files):
        with pytest.raises(ConfigError) as raised:
            read()
        assert raised.value.fact.startswith(f"line 3 of .env: in {name}, what follows the # would be")
        assert "single quotes" in raised.value.hint
        assert not {"correct", "horse", "safe"} & {*str(raised.value).split(), *raised.value.hint.split()}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("'correct # horse'", "correct # horse"),
        ("'correct # horse'   # a comment", "correct # horse"),
        ('"correct # horse" # a comment', "correct # horse"),
        ("correct#horse", "correct#horse"),
        ("#correct", "#correct"),
        ("correct  \n# a comment", "correct"),
        ("\n # a comment", ""),
    ],
)
@pytest.mark.parametrize("name", SECRETS)
def test_quotes_and_signs_within_words_are_left_alone(name: str, written: str, meant: str) -> None:
    Path(".env").write_text(f"WALSHIP_SLOT=a # a comment\n{name}={written}\n", "utf-8")
    settings = load()
    assert (settings.slot, secret_of(settings, name)) == ("a", meant)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_dotenv_that_is_no_file_is_refused(make: Callable[[Path], None]) -> None:
    make(Path(".env"))
    with pytest.raises(ConfigError, match=r"\.env is not a file"):
        load()


@pytest.mark.parametrize(("codec", "level"), [("zstd", "23"), ("gzip", "10"), ("lz4", "17"), ("none", "3")])
def test_a_level_that_the_codec_does_not_have_is_refused(
    codec: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WALSHIP_COMPRESSION", codec)
    monkeypatch.setenv("WALSHIP_COMPRESSION_LEVEL", level)
    with pytest.raises(ConfigError, match=f"{codec} has no level {level}"):
        load()


def test_several_servers_have_one_port_or_one_each() -> None:
    def servers(host: str, port: int | str) -> tuple[tuple[str, int], ...]:
        return Settings(_env_file=None, POSTGRES_HOST=host, POSTGRES_PORT=port).servers

    assert servers("db", 5433) == (("db", 5433),)
    assert servers("a, b", "5432") == (("a", 5432), ("b", 5432))
    assert servers("a,b", "5432, 5433") == (("a", 5432), ("b", 5433))


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("a,b", "5432,5433,5434", "POSTGRES_PORT has 3 ports for 2 servers"),
        ("a", "0", "'0' is no port"),
        ("a,b", "5432,", "'' is no port"),
        ("a", "65536", "'65536' is no port"),
        (" , ", "5432", "POSTGRES_HOST names no server"),
    ],
)
def test_ports_that_fit_no_server_are_refused(
    host: str, port: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_HOST", host)
    monkeypatch.setenv("POSTGRES_PORT", port)
    with pytest.raises(ConfigError, match=words):
        load()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WALSHIP_TAIL_INTERVAL", "0", "WALSHIP_TAIL_INTERVAL: must be 0.1 to 3600, in seconds"),
        ("WALSHIP_SLOT", "Wal-ship", "WALSHIP_SLOT: must be made of a to z, 0 to 9 and _, at most 63 of them"),
    ],
)
def test_what_a_setting_may_be_is_said_in_plain_words(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        load()
    assert raised.value.fact == words


@pytest.mark.parametrize(
    ("given", "names"), [("", "abc"), ("all", "abc"), ("file:///c, file:///a", "ac"), ("file:///b,file:///b", "b")]
)
def test_all_destinations_are_required_unless_some_are_named(
    given: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WALSHIP_DESTINATIONS", "file:///a,file:///b,file:///c")
    monkeypatch.setenv("WALSHIP_REQUIRED", given)
    assert load().required_urls == tuple(f"file:///{name}" for name in names)
