"""The load of the demo: a small bank whose books must always balance, and a fingerprint of all that is in them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import psycopg

from pipeline.errors import SourceError

TABLES = ("accounts", "payments")
#: Every account begins with this balance, and payments only move money: the sum can never change.
_BALANCE = 1_000
_ACCOUNTS = 1_000

_SCHEMA = f"""
CREATE TABLE accounts (id int PRIMARY KEY, owner text NOT NULL, balance numeric NOT NULL);
CREATE TABLE payments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payer int NOT NULL, payee int NOT NULL, amount numeric NOT NULL, memo text NOT NULL,
    paid_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO accounts SELECT n, 'owner ' || md5(n::text), {_BALANCE} FROM generate_series(1, {_ACCOUNTS}) n;
"""  # noqa: S608 - numbers of our own

_PAY = f"""
WITH made AS (
    INSERT INTO payments (payer, payee, amount, memo)
    SELECT 1 + floor(random() * {_ACCOUNTS}), 1 + floor(random() * {_ACCOUNTS}), floor(random() * 100),
           md5(random()::text) || md5(random()::text)
    FROM generate_series(1, %s)
    RETURNING payer, payee, amount
), moved AS (
    SELECT id, sum(change) AS change
    FROM (SELECT payer AS id, -amount AS change FROM made UNION ALL SELECT payee, amount FROM made) AS moves
    GROUP BY id
)
UPDATE accounts SET balance = balance + moved.change FROM moved WHERE accounts.id = moved.id
"""  # noqa: S608 - numbers of our own

#: Rows and content of a table, whatever order they lie in.
_DIGEST = """
SELECT count(*), encode(sha256(convert_to(coalesce(string_agg(t::text, chr(10) ORDER BY t.id), ''), 'UTF8')), 'hex')
FROM {table} AS t
"""


@dataclass(frozen=True, slots=True)
class Table:
    """What is in a table."""

    rows: int
    #: SHA-256 of all rows as text, in order of their ids.
    digest: str


@dataclass(frozen=True, slots=True)
class Books:
    """What is in the bank at one moment."""

    tables: dict[str, Table]
    #: Money in all accounts, less what was there at the beginning: 0 if the books balance.
    imbalance: int


def open_bank(dsn: str, payments: int) -> None:
    """Make the tables, and so many payments at once."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_SCHEMA)
        connection.execute(_PAY, [payments])


def look(dsn: str) -> Books:
    """The books as they are. Nobody may write meanwhile."""
    with psycopg.connect(dsn, autocommit=True, options="-c TimeZone=UTC") as connection:
        tables = {}
        for table in TABLES:
            row = connection.execute(_DIGEST.format(table=table).encode()).fetchone()
            assert row is not None
            tables[table] = Table(*row)
        row = connection.execute("SELECT sum(balance) FROM accounts").fetchone()
        assert row is not None
        return Books(tables, int(row[0]) - _BALANCE * _ACCOUNTS)


class Writer:
    """Payments without a pause, in a thread; counts what the server has confirmed. Start and stop it at will."""

    #: Payments in one transaction.
    BATCH = 100

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: psycopg.Error | None = None
        #: Transactions that the server has confirmed.
        self.commits = 0

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._write, name="writer")
        self._thread.start()

    def stop(self) -> None:
        """End after the transaction under way. Idempotent. Raises SourceError if writing failed meanwhile."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        thread.join()
        if self._failure is not None:
            raise SourceError(f"writing the load failed: {self._failure}")

    def write_for(self, seconds: float) -> None:
        """Go on for a while; start and stop around it are the caller's."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._failure is None:
            time.sleep(0.05)

    def _write(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                while not self._stop.is_set():
                    connection.execute(_PAY, [self.BATCH])
                    self.commits += 1
        except psycopg.Error as error:
            self._failure = error
