"""A throw-away machine on which the command blocks of the documents are run as they stand there.

A block is run by a real ``sh``, with redirections, variables and comments. Only places are others: ``/srv/restored`` is
a folder below the test's, ``s3://my-bucket/pg`` a prefix in the test's bucket. ``walship`` is the command, forked off
as ``tests.commands`` says; ``psql``, ``pg_ctl`` and the like are the server's own programs, run as the server's user;
``systemctl`` starts and stops the same server and service as plain processes, whose log ``journalctl`` shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, kill_tree, run_as
from infra.postgres.programs import environment_for
from infra.postgres.throwaway import free_port, make_folder
from tests import commands
from tests.docs_blocks import HOME, Block
from tests.rig import stop_started
from tests.servers import new_server, programs
from tests.stores import s3_client

_SERVER_PROGRAMS = ("psql", "pg_ctl", "pg_dump", "pg_basebackup", "initdb", "pg_upgrade", "pg_controldata")

#: Asks the test process to run a command, and is its stand-in: its folder, environment, output and exit code.
_CLIENT = """
import json, os, socket, sys
asked = {"program": sys.argv[2], "words": sys.argv[3:], "folder": os.getcwd(), "environment": dict(os.environ)}
with socket.socket(socket.AF_UNIX) as line:
    line.connect(sys.argv[1])
    line.sendall(json.dumps(asked).encode() + b"\\n")
    answer = json.loads(line.makefile("rb").read())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""
#: A program of the server as the server's user, who may be another one.
_AS_SERVER = """
import os, sys
uid, gid, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(gid), os.setuid(uid)
os.execv(program, sys.argv[3:])
"""


class Machine:
    """A host with a server, a bucket, and the folders that the documents name, all below one temporary folder."""

    def __init__(self, seaweed: Seaweed, prefix: str, major: int, *, archiving: bool = False) -> None:
        """``archiving``: as the documents' postgresql.conf has it, else the server does nothing yet."""
        self.folder = make_folder("walship-d-")
        self.seaweed = seaweed
        self.major = major
        self.bin_dir = programs(major)
        self.here = self.folder / "etc"
        self.spool = self.folder / "spool"
        user = run_as()
        self._ids = (user.get("user", os.getuid()), user.get("group", os.getgid()))
        for place in ("srv", "var"):
            (self.folder / place).mkdir()
            give(self.folder / place, user)
        server = new_server(major, self.folder, segment_mb=1)
        #: Of the server that ``systemctl`` starts and ``psql`` speaks to.
        self.data_dir, self.port = server.data_dir, server.port
        self.other_port, listen = free_port(), f"127.0.0.1:{free_port()}"
        server.configure(
            {
                "port": str(self.port), "listen_addresses": "127.0.0.1", "summarize_wal": "on",
                "unix_socket_directories": str(self.folder), "max_wal_senders": "8", "wal_keep_size": "64MB",
            }
        )  # fmt: skip
        #: What stands in a document → what it is here; the longest first.
        self.map: dict[str, str] = {
            "/var/lib/postgresql/18/main": str(self.data_dir),
            "/var/spool/walship": str(self.spool),
            "/var/backups/": f"{self.folder}/backups/",
            "/etc/walship": str(self.here),
            "/srv/": f"{self.folder}/srv/",
            "-o postgres -g postgres": "-o {} -g {}".format(*self._ids) if os.geteuid() == 0 else "",
            "AWS_ACCESS_KEY_ID=...": f"AWS_ACCESS_KEY_ID={seaweed.access_key}",
            "AWS_SECRET_ACCESS_KEY=...": f"AWS_SECRET_ACCESS_KEY={seaweed.secret_key}",
            "BACKUP_ENCRYPTION_PASSWORD=...": "BACKUP_ENCRYPTION_PASSWORD='five random words are better'",
            "read -rs POSTGRES_PASSWORD": "POSTGRES_PASSWORD=...",  # nobody types it
            "walship-recipient-1-...": "$(grep -o 'walship-recipient-1-[a-z2-7]*' restore.key)",
            "5433": str(self.other_port),
            "127.0.0.1:9432": listen,
            "infra/deploy/": f"{HOME}/infra/deploy/",
            "runuser -u postgres -- ": "",  # psql is run as the server's user in any case
        }
        self.environment = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "HOME": str(self.folder),
            "POSTGRES_PORT": str(self.port), "WALSHIP_PG_BIN_DIR": str(self.bin_dir), "WALSHIP_LISTEN": listen,
            "WALSHIP_WAL_TIMEOUT": "60", "TMPDIR": str(self.folder / "var"),
        }  # fmt: skip
        self._prefix = prefix
        self._started: list[commands.Process] = []
        #: What was typed behind ``walship`` → the process, under way or done.
        self.running: dict[str, int] = {}
        self._bridge = socketserver.ThreadingUnixStreamServer(str(self.folder / "bridge"), _answering(self))
        threading.Thread(target=self._bridge.serve_forever, daemon=True).start()
        self._install()
        if archiving:
            self.sh(f"install -d -m 700 {self.spool} {self.folder}/backups/walship {self.here}")
            give(self.spool, user)
            server.configure(
                {"archive_mode": "on", "archive_library": "basic_archive",
                 "basic_archive.archive_directory": str(self.spool)}
            )  # fmt: skip
        self._postgresql("start")

    # -- what is played

    def play(self, block: Block) -> str:
        """Do what the block says. Its output. AssertionError, with all that was printed, if it fails."""
        text = self.translate(block.text)
        if block.kind == "env":
            self.set(text)
        elif block.kind == "conf":
            with (self.data_dir / "postgresql.conf").open("a", encoding="utf-8") as file:
                file.write(text)
            self._postgresql("restart")
        elif block.kind == "hba":
            # In front: what the cluster came with trusts everybody.
            hba = self.data_dir / "pg_hba.conf"
            hba.write_text(text + hba.read_text("utf-8"), "utf-8")
            self.sh(f"pg_ctl -D {self.data_dir} reload")
        elif block.kind == "sql":
            return self.sh(f"psql -v ON_ERROR_STOP=1 <<'END'\n{text}END\n", what=str(block))
        elif block.kind == "sh":
            return self.sh(text, what=str(block))
        return ""

    def set(self, text: str) -> None:
        """Write settings into ``.env``, in the place of those that they replace."""
        path = self.here / ".env"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for line in text.splitlines():
            name = line.partition("=")[0]
            lines = [kept for kept in lines if kept.partition("=")[0] not in (name, name.removesuffix("_FILE"))]
            lines.append(line)
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        path.chmod(0o600)

    def translate(self, text: str) -> str:
        def url(match: re.Match[str]) -> str:
            found = self.seaweed.url(f"{self._prefix}-{match[1]}")
            return found if match[2] else found.partition("?")[0]

        text = re.sub(r"s3://my-bucket/(\w+)(\?region=eu-central-1)?", url, text)
        # In one go: what a place is here may look like a place that stands in a document.
        there = "|".join(re.escape(place) for place in sorted(self.map, key=len, reverse=True))
        return re.sub(there, lambda match: self.map[match[0]], text)

    def sh(self, text: str, *, what: str = "", expect: int = 0, **changed: str) -> str:
        """Run it in the folder of ``.env``, stopping at the first command that fails."""
        self._next_second(text)
        done = subprocess.run(
            ["/bin/sh", "-eu", "-c", text], env={**self.environment, **changed}, check=False, text=True, timeout=150,
            cwd=self.here if self.here.exists() else self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == expect, f"{what or text}: exit code {done.returncode}\n{text}\n{done.stdout[-6000:]}"
        return done.stdout

    def sql(self, statement: str, port: int = 0) -> list[tuple[Any, ...]]:
        import psycopg

        target = f"host=127.0.0.1 port={port or self.port} user=postgres dbname=postgres"
        with psycopg.connect(target, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def wait(self, condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s\n{self.log()[-4000:]}"
            time.sleep(0.05)

    def backups(self) -> list[str]:
        """Names of the complete ones, as any destination below the folder has them; the newest comes last."""
        return sorted(path.parent.name for path in self.folder.glob("backups/*/*/base/*/backup_info"))

    def records(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the records of operations: in the folder of backups, and in the bucket."""
        listed = s3_client(self.seaweed).list_objects_v2(Bucket=self.seaweed.bucket, Prefix=f"{self._prefix}-")
        there = (entry["Key"].partition("/log/")[2] for entry in listed.get("Contents", ()))
        return frozenset(path.name for path in self.folder.glob("backups/walship/*/log/*")), frozenset(
            filter(None, there)
        )

    def log(self) -> str:
        """Of the service."""
        path = self.folder / "service.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    # -- programs

    def answer(self, program: str, words: Sequence[str], folder: str, environment: Mapping[str, str]) -> dict[str, Any]:
        """What a stand-in in ``PATH`` asks for."""
        if program == "walship" and "run" in words:
            path = self.folder / "service.log"
            self._started.append(commands.Forked(words, environment, Path(folder), out=path, err=path))
            return {"out": "", "err": "", "code": 0}  # it is in the background
        if program == "walship":
            self._next_second(" ".join(words))
            typed = " ".join(words)
            done = commands.run(
                words, environment, Path(folder), timeout=120, started=lambda pid: self.running.update({typed: pid})
            )
            return {"out": done.stdout, "err": done.stderr, "code": done.returncode}
        action, unit = words[0], words[-1]
        try:
            (self._walship if unit == "walship" else self._postgresql)(action)
        except Exception as error:  # noqa: BLE001  # whatever it is: the block is told, and fails
            return {"out": "", "err": f"systemctl {action} {unit}: {error!r}\n", "code": 1}
        return {"out": "", "err": "", "code": 0}

    def _install(self) -> None:
        """What is in ``PATH``."""
        place = self.folder / "bin"
        place.mkdir()
        python, bridge = shlex.quote(sys.executable), shlex.quote(str(self.folder / "bridge"))
        for name, text in (("client.py", _CLIENT), ("as_server.py", _AS_SERVER)):
            (place / name).write_text(text, "utf-8")
        ask = f'exec {python} -I -S {place}/client.py {bridge} "$name" "$@"\n'
        self._script("walship", f"name=walship\n{ask}")
        self._script("systemctl", f"name=systemctl\n{ask}")
        self._script("journalctl", f"exec cat {self.folder}/service.log\n")
        if not shutil.which("curl"):
            fetch = "import sys, urllib.request as r; print(r.urlopen(sys.argv[-1], timeout=30).read().decode())"
            self._script("curl", f'exec {python} -I -S -c {shlex.quote(fetch)} "$@"\n')
        self.use(self.bin_dir)

    def use(self, bin_dir: Path) -> None:
        """From now on the server's programs are those."""
        self.bin_dir = bin_dir
        self.environment["WALSHIP_PG_BIN_DIR"] = str(bin_dir)
        uid, gid = self._ids
        library = environment_for(bin_dir).get("LD_LIBRARY_PATH", "")
        for name in _SERVER_PROGRAMS:
            self._script(
                name,
                f"export LD_LIBRARY_PATH={shlex.quote(library)} PGHOST=${{PGHOST:-127.0.0.1}}"
                f" PGPORT=${{PGPORT:-{self.port}}} PGUSER=${{PGUSER:-postgres}} PGDATABASE=${{PGDATABASE:-postgres}}\n"
                f'exec {sys.executable} -I -S {self.folder}/bin/as_server.py {uid} {gid} {bin_dir}/{name} "$@"\n',
            )

    def _script(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}", "utf-8")
        path.chmod(0o755)

    def _next_second(self, text: str) -> None:
        """Backups are named by seconds."""
        if "walship backup" in f"walship {text}":
            while f"base_{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}" <= max(self.backups(), default=""):
                time.sleep(0.02)

    # -- what systemd does

    def _walship(self, action: str) -> None:
        if action in ("stop", "restart"):
            for service in self._started:
                service.send_signal(signal.SIGTERM)
                service.wait(60)
        if action in ("start", "restart"):
            before = self.log().count('"event": "started"')
            self.sh("walship run")
            self.wait(lambda: self.log().count('"event": "started"') > before, "the service has started")

    def _postgresql(self, action: str) -> None:
        """Where it listens stands in its configuration, as at each boot."""
        self.sh(f"pg_ctl -D {self.data_dir} -w -m fast -l {self.folder}/srv/server.log {action}")

    def move(self, data_dir: Path, port: int) -> None:
        """Another server is the one that is meant from now on; walship's settings are not changed."""
        self.data_dir, self.port = data_dir, port
        self.use(self.bin_dir)

    def configure(self, data_dir: Path, **settings: str) -> None:
        """Append to a cluster's postgresql.conf."""
        with (data_dir / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name.replace('__', '.')} = '{value}'\n" for name, value in settings.items())

    def interrupt(self, words: str) -> None:
        """Ctrl-C for the command, if it is still under way."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.running[words], signal.SIGINT)

    def lose_host(self) -> None:
        """The server and its service are killed, and what they had on disk is gone."""
        kill_tree(int((self.data_dir / "postmaster.pid").read_text("ascii").split()[0]))
        self._end_services()
        for lost in (self.data_dir, self.spool, self.folder / "backups"):
            shutil.rmtree(lost)
        for left in self.folder.glob(".s.PGSQL.*"):
            left.unlink()

    def empty_bucket(self) -> None:
        """All objects of this machine go."""
        client = s3_client(self.seaweed)
        while found := client.list_objects_v2(Bucket=self.seaweed.bucket, Prefix=f"{self._prefix}-").get("Contents"):
            keys = [{"Key": entry["Key"]} for entry in found]
            client.delete_objects(Bucket=self.seaweed.bucket, Delete={"Objects": keys})

    # -- the end

    def _end_services(self) -> None:
        for service in self._started:
            service.kill()
            service.wait(60)

    def close(self) -> None:
        self._end_services()
        for path in (*self.folder.glob("*/postmaster.pid"), *self.folder.glob("*/*/postmaster.pid")):
            stop_started(path.parent)
        self._bridge.shutdown()
        self._bridge.server_close()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answering(machine: Machine) -> type[socketserver.StreamRequestHandler]:
    class Answering(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(json.dumps(machine.answer(**json.loads(self.rfile.readline()))).encode())

    return Answering
