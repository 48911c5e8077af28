"""Signals that ask a long loop to end in good order."""

from __future__ import annotations

import contextlib
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
    """Yields what SIGTERM and SIGINT write to, instead of ending the process; a second Ctrl-C ends it at once."""
    request = StopRequest()

    def ask(signum: int, frame: FrameType | None) -> None:
        if request.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = request.signum or signum

    before = {signum: signal.signal(signum, ask) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def leave_signals_to_the_parent(*_: object) -> None:
    """Makes a loader's worker ignore them: a terminal sends Ctrl-C to all, and a worker ends when its parent does."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
