from __future__ import annotations

import os
import signal

import pytest

from uvit.common.signals import stop_on_signals


@pytest.fixture(autouse=True)
def _handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_recorded_and_handlers_are_restored(signum):
    before = signal.getsignal(signum)
    with stop_on_signals() as request:
        assert request.signum == 0
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher may send it once more, while the last save is written
        assert request.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
