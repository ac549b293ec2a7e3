"""Reach PostgreSQL, and say what is wrong when it cannot be reached. Two kinds of connection, one way to make them.

Everything is psycopg's asynchronous connection: name resolution, TLS and the wait for the server never hold the event
loop, let alone the GIL, as libpq's blocking calls do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from infra.settings import Settings
from pipeline.errors import SourceError

#: How we are called in pg_stat_activity. Never ``walship``: that name belongs to the stream whose acknowledgement
#: releases synchronous commits, and any other connection of that name would release them in its place.
CONTROL_NAME = "walship_control"
BACKUP_NAME = "walship_backup"
#: A backup's sessions wait for hours, one without a word; limits that are meant for others must not end them.
_LASTING = "-c idle_session_timeout=0 -c statement_timeout=0 -c lock_timeout=0"
FETCH_NAME = "walship_fetch"

#: Seconds to wait for the server's greeting.
TIMEOUT = 10
#: The same where other servers are to be asked as well: a primary that vanished holds up the way to the next one.
TIMEOUT_OF_SEVERAL = 4

Connection: TypeAlias = AsyncConnection[tuple[Any, ...]]


class RefusedError(SourceError):
    """The server answered, and said no. ``state`` is its SQLSTATE: ``58P01``; empty if it is not known."""

    def __init__(self, fact: str, *, state: str, hint: str = "", lasting: bool = False) -> None:
        super().__init__(fact, hint=hint, lasting=lasting)
        self.state = state


class StandbyError(SourceError):
    """The server is a standby, and a primary was wanted."""


@dataclass(frozen=True, slots=True)
class _Who:
    """What messages say of a connection that failed. Holds no password."""

    host: str
    port: int
    user: str
    replication: bool

    @property
    def place(self) -> str:
        return f"{self.host}:{self.port}"


async def connect(
    settings: Settings, *, replication: bool = False, application_name: str = CONTROL_NAME, dbname: str = "postgres",
    any_server: bool = False,
) -> Connection:  # fmt: skip
    """A connection in autocommit; the caller closes it. With ``replication`` it speaks the replication protocol.

    Where the settings name several servers, to the one that is primary now (libpq's ``target_session_attrs``), or with
    ``any_server`` to the first that answers; ``place`` tells which. A single server is taken as it is.

    Raises SourceError: unreachable, refused, not permitted … each with the next step as hint, never with a secret. It
    is RefusedError with 57P03 where the server takes no connections: it starts, shuts down or recovers.
    """
    # POSTGRES_CONNECTION_MODE: in either mode the host is taken as given. What `docker` means for localhost
    # (host.docker.internal) comes with the container image.
    several = len(settings.servers) > 1
    parameters: dict[str, str | int] = {
        "user": settings.postgres_username,
        "application_name": application_name,
        "connect_timeout": TIMEOUT_OF_SEVERAL if several else TIMEOUT,
        # A SQL_ASCII database would hand out bytes of any encoding.
        "client_encoding": "UTF8",
        # A network that is cut, or a host that vanished, is noticed within half a minute, not in hours.
        "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 30_000,
    }  # fmt: skip
    # libpq takes no database for a physical replication connection, but a password file may ask for its name.
    parameters |= {"replication": "true"} if replication else {"dbname": dbname}
    if password := settings.postgres_password.get_secret_value():
        parameters["password"] = password
    if application_name == BACKUP_NAME and not replication:
        parameters["options"] = _LASTING
    if several and not any_server:
        # Not "read-write": a primary that is read-only by default is still the one that writes the WAL.
        parameters["target_session_attrs"] = "primary"
    # One after the other by ourselves: libpq's words for several failures can't be told apart by server.
    errors: list[SourceError] = []
    for host, port in settings.servers:
        try:
            return await AsyncConnection.connect(make_conninfo("", host=host, port=port, **parameters), autocommit=True)
        except psycopg.Error as error:
            errors.append(_explain(_Who(host, port, settings.postgres_username, replication), str(error)))
    raise errors[0] if len(errors) == 1 else _none_of(errors, primary=not any_server)


def place(connection: Connection) -> str:
    """Which server it is connected to: ``host:port``."""
    return f"{connection.info.host}:{connection.info.port}"


def _none_of(errors: list[SourceError], *, primary: bool) -> SourceError:
    """Several servers, each with its own reason; and the hint of the first that says more than that it is a standby."""
    wanted = "none of the servers is a primary that can be reached" if primary else "none of the servers can be reached"
    fact = f"{wanted}: {'; '.join(error.fact for error in errors)}"
    telling = [error for error in errors if not isinstance(error, StandbyError)]
    hint = telling[0].hint if telling else "promote one of them, or add the primary to POSTGRES_HOST"
    if states := [error.state for error in telling if isinstance(error, RefusedError)]:
        return RefusedError(fact, state=states[0], hint=hint)
    return SourceError(fact, hint=hint)


def _explain(who: _Who, words: str) -> SourceError:
    """The server's words → a fact and a hint. Unknown words (another language) are passed on as they are."""
    for pattern, make in _REASONS:
        if match := re.search(pattern, words):
            fact, hint = make(who, match)
            if make is _not_yet:
                return RefusedError(fact, state="57P03", hint=hint)
            return (StandbyError if make is _standby else SourceError)(fact, hint=hint)
    return SourceError(
        f"PostgreSQL at {who.place} refused the user {who.user}: {_last_line(words)}",
        hint="check POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USERNAME and POSTGRES_PASSWORD",
    )


def _last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"


_Told: TypeAlias = tuple[str, str]


def _unreachable(who: _Who, match: re.Match[str]) -> _Told:
    hint = "is it running, does listen_addresses include that address, and are POSTGRES_HOST and POSTGRES_PORT right?"
    if who.host.startswith("/"):
        hint = "is it running, is that one of its unix_socket_directories, and is POSTGRES_PORT right?"
    return f"PostgreSQL at {who.place} cannot be reached: {match[0].strip()}", hint


def _password(who: _Who, match: re.Match[str]) -> _Told:
    return (
        f"PostgreSQL at {who.place} did not accept the user {who.user}: {match[0]}",
        "check POSTGRES_USERNAME and POSTGRES_PASSWORD",
    )


def _no_hba(who: _Who, match: re.Match[str]) -> _Told:
    """Give the very line that is missing."""
    database = "replication" if match["replication"] else "postgres"
    host = match["host"]
    if host == "[local]":
        line = f"local  {database}  {who.user}  scram-sha-256"
    else:
        line = f"host  {database}  {who.user}  {host}/{128 if ':' in host else 32}  scram-sha-256"
    kind = "replication connections" if who.replication else "connections"
    return (
        f"pg_hba.conf of PostgreSQL at {who.place} does not let {who.user} in from {host} for {kind}",
        f"add this line to pg_hba.conf, before any line that rejects, and reload the server: {line}",
    )


def _no_role(who: _Who, match: re.Match[str]) -> _Told:
    return (
        f"PostgreSQL at {who.place} has no role {who.user} that may log in: {match[0]}",
        f"create it: CREATE ROLE \"{who.user}\" LOGIN REPLICATION PASSWORD '…'; and set POSTGRES_USERNAME",
    )


def _no_database(who: _Who, match: re.Match[str]) -> _Told:
    return (
        f"PostgreSQL at {who.place} has no database {match['name']}",
        f"walship keeps nothing in it but has to log in somewhere: createdb {match['name']}",
    )


def _no_replication(who: _Who, _: re.Match[str]) -> _Told:
    return (
        f"the role {who.user} of PostgreSQL at {who.place} has no REPLICATION right",
        f'give it: ALTER ROLE "{who.user}" REPLICATION;',
    )


def _no_senders(who: _Who, match: re.Match[str]) -> _Told:
    return (
        f"PostgreSQL at {who.place} has no free WAL sender: {match[0]}",
        "raise max_wal_senders and restart the server; a base backup needs one",
    )


def _too_many(who: _Who, match: re.Match[str]) -> _Told:
    return (
        f"PostgreSQL at {who.place} has no connection left for {who.user}: {match[0]}",
        "close connections or raise max_connections (or the role's CONNECTION LIMIT)",
    )


def _not_yet(who: _Who, match: re.Match[str]) -> _Told:
    return (
        f"PostgreSQL at {who.place} takes no connections now: {match[0]}",
        "try again when it is up; its log says what it is doing",
    )


def _standby(who: _Who, _: re.Match[str]) -> _Told:
    return f"PostgreSQL at {who.place} is a standby", "let POSTGRES_HOST name the primary too"


_HBA = (
    r"(?:no pg_hba.conf entry for|pg_hba.conf rejects) (?P<replication>replication )?"
    r"(?:connection (?:from|for) )?host \"(?P<host>[^\"]+)\""
)
_SENDER_RIGHT = r"permission denied to start WAL sender|must be superuser or replication role to start walsender"
_FULL = r"sorry, too many clients already|remaining connection slots are reserved[^\n]*|too many connections for[^\n]*"
_GONE = (
    r"Connection refused|No such file or directory|(?:Network|Host) is unreachable|No route to host"
    r"|connection timeout expired|timeout expired|Connection timed out|failed to resolve host[^\n]*"
    r"|could not translate host name[^\n]*|server closed the connection unexpectedly|Connection reset by peer"
)

#: Words of the server and of libpq, the more particular first.
_REASONS: tuple[tuple[str, Callable[[_Who, re.Match[str]], _Told]], ...] = (
    (_HBA, _no_hba),
    (_SENDER_RIGHT, _no_replication),
    (r"number of requested standby connections exceeds[^\n]*", _no_senders),
    (_FULL, _too_many),
    (r"database \"(?P<name>[^\"]+)\" does not exist", _no_database),
    (r"role \"[^\"]+\" (?:does not exist|is not permitted to log in)", _no_role),
    (r"(?:password|[A-Za-z0-9]+) authentication failed for user[^\n]*|no password supplied", _password),
    (r"the database system is [^\n]*", _not_yet),
    (r"server is in hot standby mode", _standby),
    (_GONE, _unreachable),
)
