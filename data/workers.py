"""Processes that load images: how many, how they start and how they end."""

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path


def processes_here() -> int:
    """How many processes torchrun has started on this machine, which share its cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_cores() -> int:
    """Cores that this process may run on, divided by the number of processes that torchrun has started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes_here())


def loading_processes(cpu_computes: bool) -> int:
    """How many processes load images if the setting is auto.

    One a core, 16 at most; if the CPU computes too, a quarter of the cores: threads that compute together on busy cores
    are many times slower.
    """
    return max(1, available_cores() // 4) if cpu_computes else min(available_cores(), 16)


def worker_context(*modules: str) -> BaseContext:
    """How worker processes start: forked from a server process that has no GPU context and no threads.

    The server imports `modules`, and what the command's file imports at its top, which each worker would import itself.
    """
    context = multiprocessing.get_context("forkserver")
    command = getattr(sys.modules["__main__"], "__file__", None)
    imported = re.findall(r"^(?:from|import) ([\w.]+)", Path(command).read_text("utf-8"), re.M) if command else []
    context.set_forkserver_preload([*imported, *modules])
    return context


def exit_with_parent() -> None:
    """In a worker process: end as soon as the parent has ended, even if it was killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory(processes: int = 1) -> None:
    """In one of `processes` that only decode: keep freed memory, up to 256 MB, for the next image.

    Otherwise each large image gets new pages from the system, which on some machines takes longer than copying it. Only
    glibc can do this; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, min(2**28, 2**32 // processes))  # 4 GB in all, at most


@contextmanager
def signals_held() -> Iterator[None]:
    """In the block, SIGTERM and SIGINT wait; processes that are started in it ignore both for good.

    Both are sent to all processes of a job, whose main process decides when its workers end.
    """
    resource_tracker.ensure_running()  # else the first worker starts it, which unblocks the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
