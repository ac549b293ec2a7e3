"""Fixtures that all tests share. What belongs to one subject stays beside its tests."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import settings

from infra.demo.seaweed import Seaweed
from tests.stores import s3_client

# A deadline per example fails on a busy machine, and says nothing about the code. Set before tests are collected.
settings.register_profile("walship", deadline=None)
settings.load_profile("walship")

# A shell starts its background jobs with SIGINT ignored, and so would be all that tests start and interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = count(1)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server, one for each worker, started when a test asks. Leave it running and its bucket there."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"), bucket="walship")
    try:
        server.start()
        # The first object makes it lay out its volumes, for a second or for many: not where a test counts seconds.
        client = s3_client(server)
        client.put_object(Bucket=server.bucket, Key="first", Body=b"?")
        client.delete_object(Bucket=server.bucket, Key="first")
        client.close()
        yield server
    finally:
        server.kill()  # nobody wants its data, and an orderly end takes seconds


@pytest.fixture
def s3_prefix() -> str:
    """A prefix in the server's bucket that no other test uses: ``seaweed.url(s3_prefix)`` is a fresh destination."""
    return f"test-{next(_numbers):04d}"


@pytest.fixture
def aws(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """The server, and its credentials in the environment."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    return seaweed
