"""Signals that ask a long loop to stop cleanly."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The signal that asked to stop.

    Attributes:
        signum: its number, or 0 for none yet.
    """

    signum: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a request that SIGTERM and SIGINT set instead of ending the process; a second Ctrl-C ends it at once.

    A signal that is already ignored, as SIGINT is in a shell's background jobs, stays ignored.
    """
    request = StopRequest()

    def ask(signum: int, frame: FrameType | None) -> None:
        if request.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = request.signum or signum

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {signum: handler for signum, handler in before.items() if handler is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, ask)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore_stop_signals(*_: object) -> None:
    """Makes a loader worker ignore them: terminals and clusters signal workers too, while the parent finishes its step.

    The worker still ends with its parent: by PyTorch's watchdog, or by `kill_workers`.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def kill_workers() -> None:
    """Kills the workers at exit: after an error, multiprocessing would wait forever for SIGTERM to end them."""
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler treats a worker's exit as an error
        for worker in workers:
            worker.kill()
