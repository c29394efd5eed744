"""What Linux's /proc says about processes. Imports almost nothing, since it measures new processes."""

from pathlib import Path

from tests.command_server import Process


def children_of(parent: int) -> list[int]:
    """Process numbers of a process's children."""
    return [int(n) for file in Path(f"/proc/{parent}/task").glob("*/children") for n in file.read_text().split()]


def workers_of(process: Process) -> list[int]:
    """Process numbers of a command's workers: the children of its child that forks them."""
    return [worker for child in children_of(process.pid) for worker in children_of(child)]


def bytes_read() -> int:
    """Bytes read from the disk for this process so far, without those from the page cache."""
    return _counter("io", "read_bytes")


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that a process has held. Not ru_maxrss: a new process starts with that of its parent."""
    return 1024 * _counter("status", "VmHWM", process)


def _counter(file: str, name: str, process: int | str = "self") -> int:
    lines = Path("/proc", str(process), file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
