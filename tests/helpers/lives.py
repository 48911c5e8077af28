"""Forks of the test's own process, whose libraries are there already: training that can be killed, and tests."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

import train
from uvit.common.cli import run
from uvit.training.checkpoint import load_checkpoint
from uvit.weights.tensors import read_weights


def start(arguments, log, prepare=lambda: None, environment=None):
    """Forks a process that runs train.py on the arguments after `prepare()`, its output in `log`; returns its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(log, "w", buffering=1) as file:
            sys.stdout = sys.stderr = file
            os.environ.update(environment or {})
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # a shell's background jobs inherit that it is ignored
            sys.argv = ["train.py", *map(str, arguments)]
            try:
                prepare()
                run(train.main)
                status = 0
            except SystemExit as exit:
                status = int(exit.code or 0)
            except BaseException:
                traceback.print_exc()
            atexit._run_exitfuncs()
    finally:
        os._exit(status)


def end(pid):
    """Returns a process's exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_fork(test):
    """Lets a test run in a process of its own: after torch.compile or fake tensors, autograd works in no fork."""

    @functools.wraps(test)
    def forked(*arguments, **named):
        if pid := os.fork():
            assert end(pid) == 0, "see the traceback above"
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


def live(arguments, log, prepare=lambda: None):
    """Runs a process to its end; returns its status and the lines that it printed, without those of the bar."""
    status = end(start(arguments, log, prepare))
    return status, lines_of(log)


def lines_of(log):
    lines = [line.strip() for line in Path(log).read_text().splitlines()]
    return [line for line in lines if line and not re.search(r"\d/\d+ \[", line)]


def live_together(arguments, folder, prepare=lambda rank: None):
    """Runs two processes that share a run over gloo; returns their statuses."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    pids = []
    for rank in range(2):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pids.append(start(arguments, folder / f"rank_{rank}.log", lambda rank=rank: prepare(rank), environment))
    return [end(pid) for pid in pids]


def at_step(step, act):
    """Makes this process act as step `step`, from 1 and counted from its start, is about to be decided on."""
    original, calls = train.agree, []

    def mean_over_processes(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            act()
        return original(*arguments)

    train.agree = agree


def metrics_of(run_dir):
    """Returns the lines of metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same(one, other):
    """Two values are the same, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other):
            assert_same(ours, theirs)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one, other):
    """Two run folders hold the same state, weights, metrics and grids, and nothing half-written."""
    assert_same(load_checkpoint(one), load_checkpoint(other))
    assert_same(read_weights(one / "model.safetensors"), read_weights(other / "model.safetensors"))
    assert metrics_of(one) == metrics_of(other)
    grids = [{path.name: path.read_bytes() for path in (run_dir / "samples").iterdir()} for run_dir in (one, other)]
    assert grids[0] == grids[1]
    for run_dir in (one, other):
        assert not [path for path in run_dir.rglob("*") if path.name.startswith(".")]
