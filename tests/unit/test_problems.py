"""What is wrong with a server: what a switch is refused for, and what only a look at it tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.postgres.control import Archiver
from infra.postgres.problems import handing_over, problems, refuse
from infra.settings import Settings
from pipeline.errors import SourceError
from tests.unit.test_status import NOON, SERVER

SETTINGS = Settings(_env_file=None, WALSHIP_SOURCES="watch", WALSHIP_SPOOL_DIR=Path("/spool"))


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ({"archive_mode": "off"}, "archive_mode is off: PostgreSQL hands over no WAL"),
        ({"archive_library": ""}, "neither archive_library nor archive_command is set"),
        ({"archive_directory": ""}, "basic_archive.archive_directory is not set"),
    ],
)
def test_what_keeps_all_wal_from_the_spool_is_refused_with_the_words_of_check(
    changed: dict[str, Any], fact: str
) -> None:
    server = replace(SERVER, **changed)
    with pytest.raises(SourceError, match=fact) as raised:
        refuse(handing_over(server, SETTINGS))
    assert (raised.value.fact, raised.value.hint) in [(found.fact, found.hint) for found in problems(server, SETTINGS)]


def test_what_passes_or_concerns_base_backups_keeps_no_segment_away() -> None:
    """Whoever has made room in the spool switches to see that archiving goes on: the server tries once a minute."""
    failing = replace(SERVER, archiver=Archiver(9, "0" * 24, None, 3, "1" * 24, NOON), max_wal_senders=0)
    refuse(handing_over(failing, SETTINGS))
    with pytest.raises(SourceError):
        refuse(problems(failing, SETTINGS))
