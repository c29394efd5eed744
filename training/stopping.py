"""Signals that ask a command to stop: it saves after the step in progress, and can be resumed."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from training import processes
from utils import Stopped


@dataclass
class StopRequest:
    """Whether a signal has asked this process to stop."""

    requested: bool = False

    def agreed(self) -> bool:
        """Whether any of the processes was asked to stop; all must call this at the same points."""
        return processes.any_of(self.requested)

    def raise_if_requested(self, saved: str) -> None:
        """Call this where all that is needed to resume is saved; `saved` completes "stopped: ".

        Raises:
            Stopped: a signal has asked to stop.
        """
        if self.agreed():
            raise Stopped(saved)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """In the block, SIGTERM and SIGINT only ask to stop; a second SIGINT raises `KeyboardInterrupt`.

    Clusters send SIGTERM some time before they kill. A command puts one block around all its work, so that no signal
    is lost between two trainings. Signals only reach the main thread; in another, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, _: Any) -> None:
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request.requested:
            request.requested = True
            if not processes.is_main():
                return
            with suppress(OSError, RuntimeError):  # the reader has gone, or the signal interrupted another print
                print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
