"""Forks of the test's own process, which has imported the libraries already: training that can be killed, and tests."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from uvit.commands import train
from uvit.common.cli import run
from uvit.training.step import Loss, training_loss
from uvit.training.trainer import Trainer


def nothing() -> None:
    """Does nothing."""


def start(
    main: Callable[[Sequence[str]], object],
    arguments: Sequence[object],
    log: Path,
    prepare: Callable[[], object] = nothing,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Forks a process that runs a command, and returns its id.

    Args:
        main: of the command.
        arguments: its command line.
        log: file for what it prints.
        prepare: called in the process first.
        environment: variables to set in it.
    """
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(log, "w", buffering=1) as file:
            sys.stdout = sys.stderr = file
            os.environ.update(environment or {})
            # A shell's background jobs inherit that it is ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["script.py", *map(str, arguments)]
            try:
                prepare()
                run(main)
                status = 0
            except SystemExit as exit:
                status = int(exit.code or 0)
            except BaseException:
                traceback.print_exc()
            atexit._run_exitfuncs()
    finally:
        os._exit(status)


def wait_for(pid: int) -> int:
    """Waits for a process to end and returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def printed_lines(log: Path) -> list[str]:
    """Returns the lines that a process printed, without those of its progress bar."""
    lines = [line.strip() for line in log.read_text().splitlines()]
    return [line for line in lines if line and not re.search(r"\d/\d+ \[", line)]


def run_forked(
    main: Callable[[Sequence[str]], object],
    arguments: Sequence[object],
    log: Path,
    prepare: Callable[[], object] = nothing,
) -> tuple[int, list[str]]:
    """Runs a command in a fork to its end; returns its exit status and the lines that it printed."""
    status = wait_for(start(main, arguments, log, prepare))
    return status, printed_lines(log)


def start_training(
    arguments: Sequence[object],
    log: Path,
    prepare: Callable[[], object] = nothing,
    loss_of: Loss = training_loss,
    make_trainer: Callable[..., Trainer] = Trainer,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Forks a process that trains, and returns its id; the arguments are as for `start`, and the trainer's own."""
    return start(
        partial(train.main, make_trainer=partial(make_trainer, loss_of=loss_of)), arguments, log, prepare, environment
    )


def train_forked(
    arguments: Sequence[object], log: Path, prepare: Callable[[], object] = nothing, **how: Any
) -> tuple[int, list[str]]:
    """Trains in a fork to its end; returns its exit status and the lines that it printed."""
    status = wait_for(start_training(arguments, log, prepare, **how))
    return status, printed_lines(log)


def train_in_two_forks(
    arguments: Sequence[object], folder: Path, how: Callable[[int], dict[str, Any]] = lambda rank: {}
) -> list[int]:
    """Trains in two processes that share a run over gloo; returns their exit statuses.

    Args:
        arguments: the command line.
        folder: for what they print, rank_0.log and rank_1.log.
        how: more arguments of `start_training` for each rank.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    pids = []
    for rank in range(2):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pids.append(start_training(arguments, folder / f"rank_{rank}.log", environment=environment, **how(rank)))
    return [wait_for(pid) for pid in pids]


def start_group() -> None:
    """Makes the process a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def in_a_fork(test: Callable[..., None]) -> Callable[..., None]:
    """Lets a test run in a process of its own: for what cannot be undone.

    After torch.compile or fake tensors, autograd works in no fork; an audit hook stays to the end of its process.
    """

    @functools.wraps(test)
    def forked(*arguments: Any, **named: Any) -> None:
        if pid := os.fork():
            assert wait_for(pid) == 0, "see the traceback above"
            return
        status = 1
        try:
            test(*arguments, **named)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    return forked
