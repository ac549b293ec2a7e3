"""The main job, told in about a minute on real parts: ship, back up, lose a table, lose everything, come back.

    servers → init, check, run → load → base backup while the load goes on → load → DROP TABLE
    → restore to the moment before, from S3 alone → put the table back → load
    → destroy the machine → restore to the latest, from S3 alone

After each restore the content is compared with what was there at that moment, by row counts and hashes.
"""

from __future__ import annotations

from infra.demo.lag import SpoolLag
from infra.demo.load import Books, Writer, look, open_bank
from infra.demo.premises import Premises
from infra.demo.restored import RestoredServer
from infra.demo.summary import Summary
from infra.demo.telling import Teller

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
        self._lag = SpoolLag(here.spool)
        self.summary = Summary()

    def tell(self) -> Summary:
        """All of it. Raises WalshipError where a step fails; a claim that does not hold is in the summary."""
        try:
            self._open()
            self._lag.start()
            self._back_up()
            before = self._drop_table()
            self._return_table(before)
            latest = self._go_on()
            self._destroy()
            self._return_everything(latest)
        finally:
            self._writer.stop()
            self._lag.stop()
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
            chapter.result = "encrypted, to a local folder and to S3"

    def _back_up(self) -> None:
        with self._teller.chapter(f"opening a bank with {self._payments:,} payments"):
            open_bank(self._server.dsn(), self._payments)
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
        self._switch()
        return before

    def _return_table(self, before: Books) -> None:
        """A copy of the moment before, beside the server that goes on; the table is brought over from there."""
        with self._teller.chapter(f"walship restore --to-name {MOMENT}, from S3 alone") as chapter:
            copy = self._here.restore("restored", "--to-name", MOMENT)
        self.summary.facts["restore to the moment"] = f"{chapter.seconds:.1f} s until the server was up"
        with self._teller.chapter("comparing, and putting the table back") as chapter:
            self.summary.compare("the moment before", before, look(copy.dsn))
            self._bring_over(copy)
            self.summary.compare("the live server again", before, look(self._server.dsn()))
            copy.close()

    def _go_on(self) -> Books:
        """Life goes on. Returns what is there at the end of the server's life."""
        with self._teller.chapter("more payments") as chapter:
            self._writer.start()
            self._writer.write_for(self._seconds)
            self._writer.stop()
            chapter.result = f"{self._writer.commits:,} transactions confirmed"
        latest = look(self._server.dsn())
        self._claim_confirmed("at the end", latest)
        self._switch()
        self._lag.stop()
        wal = int(self._server.query("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")[0][0])
        rows = latest.tables["payments"].rows
        self.summary.facts["written"] = (
            f"{rows:,} payments in {self._writer.commits:,} transactions, {wal / _MB:.0f} MB of WAL in"
            f" {len(self._lag.waited)} segments"
        )
        self.summary.facts["archive lag"] = (
            f"a segment was safe everywhere after {self._lag.mean:.1f} s on average, {self._lag.worst:.1f} s at most"
        )
        return latest

    def _destroy(self) -> None:
        with self._teller.chapter("kill -9; removing data directory, spool and local copy") as chapter:
            self._here.destroy()
            chapter.result = "only the bucket is left"

    def _return_everything(self, latest: Books) -> None:
        with self._teller.chapter("walship restore --latest, from S3 alone") as chapter:
            copy = self._here.restore("reborn", "--latest")
        self.summary.facts["restore to the latest"] = f"{chapter.seconds:.1f} s until the server was up"
        with self._teller.chapter("comparing"):
            self.summary.compare("after losing everything", latest, look(copy.dsn))
            copy.close()

    def _switch(self) -> None:
        """What is not archived yet is not offsite yet: make it so."""
        with self._teller.chapter("walship switch, until all of it is safe in both places") as chapter:
            chapter.result = f"after {self._here.walship('switch')['seconds']:.1f} s"

    def _claim_confirmed(self, when: str, books: Books) -> None:
        rows = self._payments + self._writer.commits * Writer.BATCH
        found = books.tables["payments"].rows
        self.summary.claim(f"{when}: all {rows:,} confirmed payments are in the table", holds=found == rows)

    def _bring_over(self, copy: RestoredServer) -> None:
        """The lost table, from the restored copy into the live server, as a person would do it."""
        dump = self._here.folder / "payments.sql"
        dump.write_text(self._server.run("pg_dump", "--table=payments", f"--dbname={copy.dsn}"), "utf-8")
        dump.chmod(0o644)
        self._server.run(
            "psql", "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--single-transaction",
            f"--file={dump}", f"--dbname={self._server.dsn()}",
        )  # fmt: skip
