"""Signals that ask a long loop to end in good order."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Which signal asked to stop.

    Attributes:
        signum: the signal, or 0 for none.
    """

    signum: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields what SIGTERM and SIGINT write to, instead of ending the process; a second Ctrl-C ends it at once.

    A signal that is ignored, as SIGINT is in a shell's background jobs, stays so.
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
    """Makes a loader's worker ignore them: terminals and clusters signal it too, while its parent has a step to finish.

    It ends with its parent all the same: by PyTorch's watch on it, or by `kill_workers`.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def kill_workers() -> None:
    """Ends the workers at exit: after an error, multiprocessing would wait forever for SIGTERM to end them."""
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes a worker's end for an error
        for worker in workers:
            worker.kill()
