from __future__ import annotations

from pathlib import Path

import pytest

from handlers.body import joined
from infra.settings import Settings, load
from infra.storage import display_name, make_folder, open_store
from pipeline.errors import ConfigError, StoreError
from pipeline.objects import MemoryBody


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_names_are_for_people_and_hold_no_options() -> None:
    assert open_store("file:///var/backups/pg", Settings()).name == "file:///var/backups/pg"
    url = "s3://bucket/some/prefix/?endpoint=http://s3:8333&region=eu-1&path_style=true&sse=aws:kms&kms_key=k1"
    assert open_store(url, Settings()).name == "s3://bucket/some/prefix" == display_name(url)
    assert open_store("s3://bucket", Settings()).name == "s3://bucket" == display_name("s3://bucket/")
    assert display_name("s3://key:secret@bucket/p?x=y") == "s3://bucket/p"


async def test_a_folder_is_a_store(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    url = f"file://{tmp_path}/with%20space"
    with pytest.raises(StoreError, match="is not there"):
        await open_store(url, Settings()).put("a", MemoryBody((b"x",)))
    make_folder(url)
    make_folder(url)
    store = open_store(url, Settings())
    await store.put("a", MemoryBody((b"x",)))
    assert joined(await store.get("a")) == b"x"
    assert folder.is_dir()


def test_a_folder_is_made_only_in_a_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be made: No such file"):
        make_folder(f"file://{tmp_path}/a/b")
    make_folder("s3://bucket/prefix")


@pytest.mark.parametrize(
    ("url", "fact", "hint"),
    [
        ("/backups", "/backups is no destination", "file:///folder"),
        ("ftp://host/x", "ftp://host/x is no destination", "s3://bucket"),
        ("file://backups", "names a host, or is a relative path", "file:///absolute/path"),
        ("file:backups", "not the absolute path", "file:///absolute/path"),
        ("file:///a/../b", "not the absolute path", "file:///absolute/path"),
        ("file:///", "not the absolute path", "file:///absolute/path"),
        ("file:///a?region=x", "a folder has none", "s3://bucket"),
        ("s3:///prefix", "names no bucket", "s3://bucket"),
        ("s3://host:9000/bucket", "names no bucket, or more", "endpoint"),
        ("s3://b/p?regoin=x", "unknown option regoin", "endpoint, region, path_style"),
        ("s3://b/p?region=x&region=y", "option region twice", "keep one of them"),
        ("s3://b/p?region=", "option region of s3://b/p is ''", "not empty"),
        ("s3://b/p?path_style=yes", "option path_style of s3://b/p is 'yes'", "true or false"),
        ("s3://b/p?checksums=none", "option checksums", "when_required or when_supported"),
        ("s3://b/p?region", "are not key=value", "s3://bucket"),
        ("s3://b/p?endpoint=s3:8333", "endpoint of s3://b/p is no http:// or https:// address", "https://host:port"),
        ("s3://b/a//b", "prefix that cannot be one", "s3://bucket/backups/walship"),
        ("s3://b/../b", "prefix that cannot be one", "s3://bucket/backups/walship"),
    ],
)
def test_a_wrong_destination_is_explained(url: str, fact: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_store(url, Settings())
    assert fact in raised.value.fact
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:topsecret@bucket/p",
        "s3://b/p?endpoint=http://me:topsecret@host",
        "file://me:topsecret@host/backups",
        "file:///a/../b?key=topsecret",
        "https://me:topsecret@host/b",
    ],
)
def test_secrets_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_store(url, Settings())
    assert "topsecret" not in raised.value.fact + raised.value.hint


def test_secrets_in_the_name_of_a_required_destination_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALSHIP_DESTINATIONS", "s3://b/p")
    monkeypatch.setenv("WALSHIP_REQUIRED", "s3://AKIA:topsecret@bucket/p?key=topsecret")
    with pytest.raises(ConfigError, match="WALSHIP_REQUIRED names s3://bucket/p, which is no destination") as raised:
        load()
    assert "topsecret" not in raised.value.fact + raised.value.hint


def test_half_of_the_credentials_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    with pytest.raises(ConfigError, match="only one is set"):
        open_store("s3://bucket", Settings())


@pytest.mark.parametrize("url", ["http://[::1", "s3://b?endpoint=http://[::1", "s3://b?endpoint=http://h:99999"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        open_store(url, Settings(_env_file=None))
