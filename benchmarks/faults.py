"""Does a run that is killed again and again end as one that never was? `python benchmarks/faults.py`

Trains a small model of digits to the end; then the same in another folder, killed at random moments, a third of them
while a checkpoint is being written, and started again with the same command each time. Compares the last checkpoint,
the weights, the grids and the lines of metrics bit for bit, and counts the steps that each kill cost. Then measures
what saving costs, and how soon a resumed run does its first step. Writes benchmarks/results/faults.json.

A life is a process of its own that runs train.py's main, with loader workers of its own, and is really killed. It is
forked from this script, which has the libraries imported already: 50 lives would else spend their time on imports.
"""

from __future__ import annotations

import atexit
import json
import math
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ROOT, describe_machine

from uvit.commands import train
from uvit.common.cli import parse, run
from uvit.common.errors import TrainingError
from uvit.config import CHECKPOINT_FOLDER, METRICS_FILE, STEP_PREFIX, WEIGHTS_FILE
from uvit.training.checkpoint import load_checkpoint
from uvit.training.step import StepResult
from uvit.training.trainer import Trainer

RESULT = RESULTS / "faults.json"
CONFIG = str(ROOT / "configs" / "digits.py")
SAVE_EVERY = 20
# With all that a resumed run must take up: workers, parts of a batch, flips, dropped labels, lines between checkpoints.
SMALL = {
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "data.num_workers": 2,
    "data.flip": True,
    "train.accumulation_steps": 2,
    "train.label_dropout": 0.2,
    "train.log_every": 7,
    "train.save_every": SAVE_EVERY,
    "train.sample_every": 250,
    "train.tracker": "none",
    "sample.num_steps": 2,
}
SIGNALS = {signal.SIGKILL: 0.7, signal.SIGTERM: 0.15, signal.SIGINT: 0.15}
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    kills: int = 50
    """Lives that are ended."""
    num_steps: int = 1500
    """Steps of the run."""
    seed: int = 0
    """Seed of the moments and signals."""
    costs: bool = True
    """Measure what saving costs and how long a start takes, too."""
    output: str | None = str(RESULT)
    """File for the figures; None is none."""


class Counter:
    """Numbers that a life writes and this script reads: steps taken, and when the first one ended."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)  # shared with every fork

    @property
    def steps(self) -> int:
        return struct.unpack_from("q", self.memory, 0)[0]

    @property
    def first_step_at(self) -> float:
        return struct.unpack_from("d", self.memory, 8)[0]

    def reset(self) -> None:
        self.memory[:] = bytes(16)

    def add_step(self) -> None:
        """Counts a step of this process."""
        struct.pack_into("q", self.memory, 0, self.steps + 1)
        if self.steps == 1:
            struct.pack_into("d", self.memory, 8, time.monotonic())


class CountedTrainer(Trainer):
    """Counts its steps.

    Args:
        counter: counts them.
        *arguments: as for `Trainer`.
    """

    def __init__(self, counter: Counter, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counter = counter

    def step(self, signum: int) -> StepResult:
        result = super().step(signum)
        self.counter.add_step()
        return result


class TimedTrainer(Trainer):
    """Times what it writes when it saves.

    Args:
        seconds: takes the time of each save.
        *arguments: as for `Trainer`.
    """

    def __init__(self, seconds: list[float], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds = seconds

    def write(self, state: dict[str, Any], keep: int | None) -> None:
        started = time.perf_counter()
        super().write(state, keep)
        self.seconds.append(time.perf_counter() - started)


def start_life(run_dir: Path, counter: Counter, overrides: dict[str, Any]) -> int:
    """Forks a process that runs the command line in a process group of its own; returns its id."""
    counter.reset()
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        log = os.open(run_dir.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
        sys.argv = ["train.py", CONFIG, "--train.run_dir", str(run_dir), *flags]
        run(partial(train.main, make_trainer=partial(CountedTrainer, counter)))
        status = 0
    except SystemExit as exit:
        status = int(exit.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # What an interpreter does at its end; returning would go on with this script.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_of(pid: int) -> int:
    """Waits for a life and returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> bool:
    """Tells whether a life is over, without taking its status."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def half_written(run_dir: Path) -> set[str]:
    """Returns the checkpoints that are half-written, with those that an earlier life left so."""
    folder = run_dir / CHECKPOINT_FOLDER
    return {name for name in os.listdir(folder) if name.startswith(f".{STEP_PREFIX}")} if folder.is_dir() else set()


def newest_step(run_dir: Path) -> int:
    """Returns the step of the newest whole checkpoint, 0 for none."""
    state = load_checkpoint(run_dir)
    return 0 if state is None else state["step"]


def kill(
    pid: int,
    run_dir: Path,
    until: float,
    counter: Counter,
    steps: float,
    aim: bool,
    left: set[str],
    signum: int,
    rng: random.Random,
) -> bool:
    """Sends a signal to a life, SIGINT to its whole group as a terminal does.

    Args:
        pid: the life.
        run_dir: its run.
        until: time to send it at.
        counter: the life's; after `steps` steps the signal is sent before that time.
        steps: how many.
        aim: wait then until a checkpoint is being written.
        left: what an earlier life left half-written.
        signum: the signal.
        rng: spreads the moment over a step.

    Returns:
        Whether it met a live process.
    """
    while not has_ended(pid) and time.monotonic() < until and counter.steps < steps:
        time.sleep(rng.uniform(0, 0.01))
    while aim and not has_ended(pid) and half_written(run_dir) <= left:
        time.sleep(0.0005)
    if has_ended(pid):
        return False
    if signum == signal.SIGINT:
        os.killpg(pid, signum)
    else:
        os.kill(pid, signum)
    return True


def killed_run(given: Arguments, run_dir: Path, start_time: float) -> dict[str, Any]:
    """Kills a run until it has had its number, then lets it end; returns the figures."""
    rng, counter = random.Random(given.seed), Counter()
    overrides = {**SMALL, "train.num_steps": given.num_steps}
    signals: dict[str, int] = {}
    lost, while_writing, saved, tracebacks, log = [], 0, 0, 0, run_dir.with_suffix(".log")
    while (left := given.kills - len(lost)) > 0:
        # At any moment of the steps to come, or before them; within a share of all, so that no life ends by itself.
        share = (given.num_steps - saved) / (left + 1)
        is_early = rng.random() < 0.2
        steps = share if is_early else rng.uniform(0, share)
        until = time.monotonic() + rng.uniform(0, start_time) if is_early else math.inf
        aim = rng.random() < 1 / 3 and given.num_steps - saved > share + 2 * SAVE_EVERY
        (signum,) = [signal.SIGKILL] if aim else rng.choices(list(SIGNALS), list(SIGNALS.values()))
        log.unlink(missing_ok=True)  # workers that outlive a SIGKILL for a moment keep the old one
        left = half_written(run_dir)
        pid = start_life(run_dir, counter, overrides)
        met = kill(pid, run_dir, until, counter, steps, aim, left, signum, rng)
        status = end_of(pid)
        if not met:
            raise TrainingError(f"a life ended by itself, with status {status}: see {run_dir.with_suffix('.log')}")
        if status != STATUS.get(signum, -signum):
            raise TrainingError(f"signal {signum} ended a life with status {status}")
        if signum != signal.SIGKILL and "Traceback" in (text := log.read_text(errors="replace")):
            tracebacks += 1
            print(text, flush=True)
        while_writing += not half_written(run_dir) <= left
        reached, saved = saved + counter.steps, newest_step(run_dir)
        lost.append(reached - saved)
        signals[signal.Signals(signum).name] = signals.get(signal.Signals(signum).name, 0) + 1
        print(f"kill {len(lost)}: {signal.Signals(signum).name} at step {reached}, {lost[-1]} lost", flush=True)
    status = end_of(start_life(run_dir, counter, overrides))
    if status:
        raise TrainingError(f"the last life ended with status {status}")
    return {
        "kills": len(lost),
        "signals": signals,
        "kills_while_a_checkpoint_was_written": while_writing,
        "steps_lost_most": max(lost),
        "steps_lost_mean": statistics.mean(lost),
        "tracebacks_after_sigterm_or_sigint": tracebacks,
    }


def equal(one: Any, other: Any) -> bool:
    """Tells whether two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def compare(one: Path, other: Path) -> dict[str, bool]:
    """Compares what two runs left."""
    weights = [(folder / WEIGHTS_FILE).read_bytes() for folder in (one, other)]
    grids = [{path.name: path.read_bytes() for path in (folder / "samples").iterdir()} for folder in (one, other)]
    return {
        "checkpoint": equal(load_checkpoint(one), load_checkpoint(other)),
        "metrics": lines_of(one) == lines_of(other),
        "weights": weights[0] == weights[1],
        "grids": grids[0] == grids[1],
        "nothing_left_over": not any(path.name.startswith(".") for path in other.rglob("*")),
    }


def timed_start(run_dir: Path, overrides: dict[str, Any]) -> tuple[float, float]:
    """Runs a life to its end; returns the seconds to its first step, and those after it."""
    counter, started = Counter(), time.monotonic()
    if status := end_of(start_life(run_dir, counter, overrides)):
        raise TrainingError(f"a life ended with status {status}: see {run_dir.with_suffix('.log')}")
    return counter.first_step_at - started, time.monotonic() - counter.first_step_at


def costs(folder: Path) -> dict[str, float]:
    """Measures configs/digits.py: a save against the 500 steps before it, and a fresh start against a resumed one."""
    steps = 500
    shared = {"train.sample_every": 0, "train.tracker": "none", "train.save_every": steps}
    fresh, taken = timed_start(folder / "costs", {**shared, "train.num_steps": steps})
    resumed, _ = timed_start(folder / "costs", {**shared, "train.num_steps": steps + 10})
    # In this process, so that the time of each save is seen; no life is forked from here on.
    saves: list[float] = []
    flags = [text for name, value in shared.items() for text in (f"--{name}", str(value))]
    for number in range(10, 20):
        words = [CONFIG, "--train.run_dir", str(folder / "saves"), *flags, "--train.num_steps", str(number)]
        train.main(words, partial(TimedTrainer, saves))
    save = statistics.median(saves)
    return {
        "seconds_of_500_steps": taken,
        "seconds_of_a_save": save,
        "share_of_saving_at_save_every_500": save / (taken - save),
        "seconds_to_first_step_fresh": fresh,
        "seconds_to_first_step_resumed": resumed,
    }


def main(arguments: list[str]) -> None:
    """Kills, compares, measures and writes the figures.

    Raises:
        TrainingError: the runs are not equal, or a kill cost more than the steps since a checkpoint.
    """
    given = parse(Arguments, arguments, __doc__)
    folder = Path(tempfile.mkdtemp())  # a TemporaryDirectory would be removed at the end of every fork
    try:
        whole, parts = folder / "whole", folder / "parts"
        start_time, _ = timed_start(whole, {**SMALL, "train.num_steps": given.num_steps})
        results: dict[str, Any] = {"num_steps": given.num_steps, "save_every": SAVE_EVERY}
        results |= killed_run(given, parts, start_time)
        results["equal"] = compare(whole, parts)
        if given.costs:
            results["costs"] = costs(folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(results, indent=2))
    if given.output is not None:
        Path(given.output).write_text(json.dumps({**describe_machine(), **results}, indent=2) + "\n")
    unequal = [name for name, holds in results["equal"].items() if not holds]
    most, tracebacks = results["steps_lost_most"], results["tracebacks_after_sigterm_or_sigint"]
    if unequal or most > SAVE_EVERY or tracebacks:
        raise TrainingError(f"not equal: {unequal}, steps lost by one kill: {most}, tracebacks: {tracebacks}")


if __name__ == "__main__":
    run(main)
