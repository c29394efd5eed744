"""Runs `python -m module arguments` in a fork of a process that has imported the libraries, which takes four seconds.

Nothing of the project itself is imported there. `Server.run` starts one such process and uses it for all commands.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = (
    "huggingface_hub jinja2 matplotlib.pyplot optuna.storages pandas pydantic scipy.stats sklearn.calibration "
    "sklearn.model_selection sqlalchemy.engine timm torch.utils.data torchvision.transforms.v2 tqdm tyro"
)


class Server:
    """Ends with this process, whose end closes its standard input."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.command_server"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """`python -m *command` without a terminal; it is killed after `timeout` seconds."""
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch, name) for name in ("out", "errors")]
            request = [list(command), dict(environment), list(map(str, files)), timeout]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            texts = [file.read_text(errors="surrogateescape") for file in files]
        return subprocess.CompletedProcess(["python", "-m", *command], code, *texts)


def serve() -> None:
    """Fork for each line of standard input; answer with the exit code."""
    for line in sys.stdin:
        command, environment, files, timeout = json.loads(line)
        child = os.fork()
        if not child:
            become(command, environment, files)
            return
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it left behind
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


def become(command: list[str], environment: dict[str, str], files: list[str]) -> None:
    """In a fork: the command's process, as far as it can see."""
    os.setsid()
    for number, name in enumerate((os.devnull, *files)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for library in LIBRARIES.split():
        __import__(library)
    serve()
