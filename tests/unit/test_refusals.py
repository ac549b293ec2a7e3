"""Words of servers and of libpq that cannot be provoked on every machine."""

from __future__ import annotations

import pytest

from infra.postgres.connect import _explain, _Who

WHO = _Who("db.example.com", 5432, "walship", replication=True)


@pytest.mark.parametrize(
    ("words", "fact", "hint"),
    [
        (
            'FATAL:  no pg_hba.conf entry for replication connection from host "2001:db8::7", user "walship", SSL off',
            "does not let walship in from 2001:db8::7 for replication connections",
            "host  replication  walship  2001:db8::7/128  scram-sha-256",
        ),
        (
            'FATAL:  no pg_hba.conf entry for host "[local]", user "walship", database "postgres", no encryption',
            "does not let walship in from [local]",
            "local  postgres  walship  scram-sha-256",
        ),
        (
            'FATAL:  pg_hba.conf rejects replication connection for host "10.0.0.5", user "walship", no encryption',
            "does not let walship in from 10.0.0.5",
            "before any line that rejects",
        ),
        ('FATAL:  Peer authentication failed for user "walship"', "Peer authentication failed", "POSTGRES_USERNAME"),
        ("failed to resolve host 'db.example.com': [Errno -2]", "failed to resolve host", "POSTGRES_HOST"),
        ("connection timeout expired", "cannot be reached: connection timeout expired", "listen_addresses"),
        ("FATAL:  the database system is starting up", "takes no connections now", "try again"),
        ("FATAL:  Passwort-Authentifizierung fehlgeschlagen", "Authentifizierung fehlgeschlagen", "POSTGRES_PASSWORD"),
        ("", "it gave no reason", "POSTGRES_HOST"),
    ],
)  # fmt: skip
def test_words_become_a_fact_and_a_remedy(words: str, fact: str, hint: str) -> None:
    error = _explain(WHO, words)
    assert fact in error.fact
    assert hint in error.hint
    assert "db.example.com:5432" in error.fact


def test_a_socket_has_nothing_to_do_with_listen_addresses() -> None:
    error = _explain(_Who("/var/run/postgresql", 5432, "walship", replication=False), "No such file or directory")
    assert "listen_addresses" not in error.hint
    assert "unix_socket_directories" in error.hint
