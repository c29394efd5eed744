"""Runs `python -m module arguments` in a fork of a process that has imported the libraries, which saves four seconds.

Nothing of the project itself is imported there. A `Server` starts one such process and uses it for all commands.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

LIBRARIES = (
    "huggingface_hub jinja2 matplotlib.pyplot optuna.storages pandas pydantic scipy.stats sklearn.calibration "
    "sklearn.model_selection sqlalchemy.engine timm torch.utils.data torchvision.transforms.v2 tqdm tyro"
)


class Server:
    """Ends with this process, because that closes its standard input."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.command_server"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def _ask(self, kind: str, *request: object) -> int | None:
        self._process.stdin.write(json.dumps([kind, *request]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m *command` without a terminal; it is killed after `timeout` seconds."""
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch, name) for name in ("out", "errors")]
            process = Process(self, list(command), environment, files)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
            texts = [file.read_text(errors="surrogateescape") for file in files]
            return subprocess.CompletedProcess(["python", "-m", *command], process.wait(), *texts)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> "Process":
        """Start `python -m *command` as subprocess.Popen would, with its output in pipes."""
        with tempfile.TemporaryDirectory() as scratch:
            pipes = [Path(scratch, name) for name in ("out", "errors")]
            for pipe in pipes:
                os.mkfifo(pipe)
            process = Process(self, list(command), environment, pipes)
            process.stdout, process.stderr = (pipe.open(errors="surrogateescape") for pipe in pipes)
        return process


class Process:
    """The part of subprocess.Popen that tests use; the process is a child of the server and leads a process group."""

    stdout: TextIO
    stderr: TextIO

    def __init__(self, server: Server, command: list[str], environment: Mapping[str, str], files: list[Path]) -> None:
        self._server, self.args, self.returncode = server, command, None
        self.pid = server._ask("start", command, dict(environment), list(map(str, files)))

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server._ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The exit code; raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """All that it prints from here on, after its end; raises subprocess.TimeoutExpired."""
        with ThreadPoolExecutor(2) as readers:
            printed = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
                return printed[0].result(timeout), printed[1].result(timeout)
            except (subprocess.TimeoutExpired, TimeoutError) as error:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout) from error

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def serve() -> None:
    """For each line of standard input: fork, or poll a fork; answer with its process number or exit code."""
    gc.collect()
    gc.freeze()  # or garbage collection in a fork would copy all memory, which takes a second
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so would their commands
    for line in sys.stdin:
        kind, *request = json.loads(line)
        if kind == "start":
            answer = os.fork()
            if not answer:
                become(*request)
                return
        else:
            pid, status = os.waitpid(*request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def become(command: list[str], environment: dict[str, str], files: list[str]) -> None:
    """Make a fork look like a new process of the command, and run it."""
    os.setsid()
    for number, name in enumerate((os.devnull, *files)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # determined by the new environment
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for library in LIBRARIES.split():
        __import__(library)
    serve()
