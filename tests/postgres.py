"""A PostgreSQL server for tests: on the loopback, in a temporary folder, without passwords and fsync."""

import glob
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

INITDB = shutil.which("initdb") or next(iter(sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)), "")
MISSING = " and ".join(
    name for name, there in (("initdb", INITDB), ("psycopg", importlib.util.find_spec("psycopg"))) if not there
)
# The server refuses to run as root.
USER: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}


class Postgres:
    """Runs from its creation to the end of its `with` block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres_"))
        if USER:
            shutil.chown(self.folder, USER["user"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"
        self._binaries = Path(INITDB).resolve().parent
        self._run("initdb", "-D", self.folder / "data", "--username=postgres", "--auth=trust", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str | Path) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "cwd": self.folder, **USER}
        subprocess.run([self._binaries / program, *arguments], check=True, timeout=60, **quiet)

    def start(self) -> None:
        options = (f"port={self.port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
        flags = [part for option in options for part in ("-c", option)]
        command = [self._binaries / "postgres", "-D", self.folder / "data", *flags]
        with open(self.folder / "log", "a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **USER)
        deadline = time.monotonic() + 60
        while subprocess.run([self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: end all connections; SIGQUIT: as in a crash."""
        self._process.send_signal(how)
        self._process.wait(60)

    def execute(self, statement: str, *values: object) -> list[tuple]:
        import psycopg

        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def __enter__(self) -> "Postgres":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)
