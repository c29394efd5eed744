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
    """Cores that this process may run on; its share of them, of several that torchrun has started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes_here())


def loading_processes(cpu_computes: bool) -> int:
    """How many processes load images where the settings leave it open.

    One a core, 16 at most; where the CPU computes too, a quarter of the cores, so that neither waits
    for the other: threads that compute together on cores that are taken are many times slower, not a little.
    """
    return max(1, available_cores() // 4) if cpu_computes else min(available_cores(), 16)


def worker_context(*modules: str) -> BaseContext:
    """How worker processes start: forked from a server process that holds no GPU and no threads.

    There `modules` are imported, and what the command's file imports at its top, as each worker would by itself.
    """
    context = multiprocessing.get_context("forkserver")
    command = getattr(sys.modules["__main__"], "__file__", None)
    at_its_top = re.findall(r"^(?:from|import) ([\w.]+)", Path(command).read_text("utf-8"), re.M) if command else []
    context.set_forkserver_preload([*at_its_top, *modules])
    return context


def exit_with_parent() -> None:
    """In a worker process: end as soon as the parent has ended, however it did."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory(processes: int = 1) -> None:
    """In one of `processes` that do nothing but decode: keep what is freed, up to 256 MB, for the next image.

    Else each large image gets new pages from the system, which on some machines takes longer than copying it. Only
    glibc has this switch; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, min(2**28, 2**32 // processes))  # 4 GB in all, at most


@contextmanager
def signals_held() -> Iterator[None]:
    """In the block, SIGTERM and SIGINT wait; processes that are started in it ignore them for good.

    Both are sent to all processes of a job, and it is for the first to decide when the others end.
    """
    resource_tracker.ensure_running()  # or the first worker starts it, which lets the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
