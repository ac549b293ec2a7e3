"""The main job, told in about a minute on real parts: ship, back up, lose a table, lose everything, come back.

    servers → init, check, run → load → base backup while the load goes on → load → DROP TABLE
    → restore to the moment before, from S3 alone → put the table back → load
    → lose the machine, twice, and come back from S3 alone: see ``losses``

After each restore the content is compared with what was there at that moment, by row counts and hashes. No segment is
ever switched for it: the open one is offsite as well.
"""

from __future__ import annotations

from infra.demo.lag import SpoolLag, StreamLag
from infra.demo.load import Books, Writer, look, open_bank
from infra.demo.losses import Losses
from infra.demo.premises import Premises
from infra.demo.restored import RestoredServer
from infra.demo.summary import Summary
from infra.demo.telling import Teller
from infra.demo.tickets import open_tickets

#: The restore point, as a careful person sets one before a risky change.
MOMENT = "before_the_mistake"
_MB = 1 << 20


class Story:
    """Told once, by ``tell``."""

    def __init__(self, here: Premises, teller: Teller, *, seconds: float, payments: int) -> None:
        """``seconds`` of load in each part; the bank begins with so many ``payments``."""
        self._here = here
        self._teller = teller
        self._seconds = seconds
        self._payments = payments
        self._server = here.server
        self._writer = Writer(here.server.dsn())
        self._archive = SpoolLag(here.spool)
        self._stream = StreamLag(here.server.dsn())
        self.summary = Summary()

    def tell(self) -> Summary:
        """All of it. Raises WalshipError where a step fails; a claim that does not hold is in the summary."""
        losses = Losses(self._here, self._teller, self.summary, seconds=self._seconds)
        try:
            self._open()
            self._archive.start()
            self._stream.start()
            self._back_up()
            before = self._drop_table()
            self._return_table(before)
            books = self._go_on()
            losses.sell()
            self._tell_lags()
            losses.lose(books)
            losses.lose_again(books)
        finally:
            losses.close()
            self._writer.stop()
            self._archive.stop()
            self._stream.stop()
        self.summary.facts["the whole story"] = f"{self._teller.seconds:.0f} s"
        return self.summary

    def _open(self) -> None:
        with self._teller.chapter("starting PostgreSQL and an S3 server") as chapter:
            self._here.open()
            chapter.result = f"PostgreSQL {self._here.version}; SeaweedFS at {self._here.s3.endpoint}"
        with self._teller.chapter("walship init, check, run") as chapter:
            self._here.walship("init")
            self._here.walship("check")
            self._here.start_service()
            chapter.result = "encrypted, to a local folder and to S3; from the archive and the stream"

    def _back_up(self) -> None:
        with self._teller.chapter(f"opening a bank with {self._payments:,} payments"):
            open_bank(self._server.dsn(), self._payments)
            open_tickets(self._server.dsn())
            self._writer.start()
        with self._teller.chapter("walship backup, while payments go on") as chapter:
            taken = self._here.walship("backup")
            chapter.result = f"{taken['size'] / _MB:.0f} MB, stored as {taken['stored_size'] / _MB:.0f} MB"
        self.summary.facts["base backup"] = f"{chapter.result}, in {chapter.seconds:.1f} s"
        with self._teller.chapter("more payments") as chapter:
            self._writer.write_for(self._seconds)
            self._writer.stop()
            chapter.result = f"{self._writer.commits:,} transactions confirmed"

    def _drop_table(self) -> Books:
        """The mistake. Returns what was there the moment before."""
        with self._teller.chapter(f"restore point {MOMENT}, then DROP TABLE payments"):
            before = look(self._server.dsn())
            self._server.query(f"SELECT pg_create_restore_point('{MOMENT}')")
            self._server.query("DROP TABLE payments")
        self._claim_confirmed("before the mistake", before)
        with self._teller.chapter("until that is safe in both places, the segment still open"):
            self._here.wait_until_safe()
        return before

    def _return_table(self, before: Books) -> None:
        """A copy of the moment before, beside the server that goes on; the table is brought over from there."""
        with self._teller.chapter(f"walship restore --to-name {MOMENT}, from S3 alone") as chapter:
            copy = self._here.restore("restored", "--to-name", MOMENT)
        self.summary.facts["restore to the moment"] = f"{chapter.seconds:.1f} s until the server was up"
        with self._teller.chapter("comparing, and putting the table back"):
            self.summary.compare("the moment before", before, look(copy.dsn()))
            self._bring_over(copy)
            self.summary.compare("the live server again", before, look(self._server.dsn()))
            copy.kill9()

    def _go_on(self) -> Books:
        """Life goes on. Returns what the bank is left with."""
        with self._teller.chapter("more payments") as chapter:
            self._writer.start()
            self._writer.write_for(self._seconds)
            self._writer.stop()
            chapter.result = f"{self._writer.commits:,} transactions confirmed"
            latest = look(self._server.dsn())
        self._claim_confirmed("at the end", latest)
        wal = int(self._server.query("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")[0][0])
        self.summary.facts["written"] = (
            f"{latest.tables['payments'].rows:,} payments in {self._writer.commits:,} transactions,"
            f" {wal / _MB:.0f} MB of WAL"
        )
        return latest

    def _tell_lags(self) -> None:
        self._archive.stop()
        self._stream.stop()
        archive, stream = self._archive, self._stream
        self.summary.facts["archive lag"] = (
            f"a finished segment was safe everywhere after {archive.mean:.1f} s on average, {archive.worst:.1f} s at"
            f" most ({len(archive.waited)} segments)"
        )
        self.summary.facts["tail lag"] = (
            f"a byte, finished or not, was safe everywhere after {stream.mean:.1f} s on average, {stream.worst:.1f} s"
            " at most"
        )

    def _claim_confirmed(self, when: str, books: Books) -> None:
        rows = self._payments + self._writer.commits * Writer.BATCH
        found = books.tables["payments"].rows
        self.summary.claim(f"{when}: all {rows:,} confirmed payments are in the table", holds=found == rows)

    def _bring_over(self, copy: RestoredServer) -> None:
        """The lost table, from the restored copy into the live server, as a person would do it."""
        dump = self._here.folder / "payments.sql"
        dump.write_text(self._server.run("pg_dump", "--table=payments", f"--dbname={copy.dsn()}"), "utf-8")
        dump.chmod(0o644)
        self._server.run(
            "psql", "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--single-transaction",
            f"--file={dump}", f"--dbname={self._server.dsn()}",
        )  # fmt: skip
