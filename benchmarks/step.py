"""What makes a training step on a CPU faster without changing it: `python benchmarks/step.py`.

Each arm is a process of its own, for how memory is allocated cannot be changed back, and they take steps in turn.
Writes benchmarks/results/step.json.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from judged_runs import study_config
from measure import save_result, seconds_of
from tqdm import tqdm

from uvit.common.cli import parse, run
from uvit.common.signals import StopRequest
from uvit.data.loader import load_data
from uvit.networks.encoders import NO_ENCODERS
from uvit.training import optim, trainer

ARMS = {
    "as libraries have it": (False, False),
    "Muon's matrices together": (True, False),
    "memory kept": (False, True),
    "ours": (True, True),
}
"""Whether matrices are updated together, and whether freed memory is kept."""
WARM_UP = 5


@dataclass(frozen=True, kw_only=True)
class Arguments:
    configs: tuple[Literal["digits", "photos"], ...] = ("digits", "photos")
    """Configs, whose data are embedded."""
    rounds: int = 60
    """Timed steps of each arm."""


def take_steps(name: str, together: bool, keeps_memory: bool, pipe: Connection) -> None:
    """Takes a step of a config for each message, and answers with its seconds and page faults, until one is False."""
    if not together:
        optim.update_together = lambda *_, **__: None
    if not keeps_memory:
        trainer.set_up_process = lambda num_threads, _: torch.set_num_threads(num_threads)
    config, request = study_config(name), StopRequest()
    with tempfile.TemporaryDirectory() as folder:
        one = trainer.Trainer(config, load_data(config.data, config.model), NO_ENCODERS, Path(folder))
        one.build()
        one.resume(())
        while pipe.recv():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds = seconds_of(lambda: one.step(request))
            pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Returns for each arm the median seconds and page faults of a step, and the median ratio of seconds in a round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for arm, (together, keeps_memory) in ARMS.items():
        pipes[arm], theirs = context.Pipe()
        processes.append(context.Process(target=take_steps, args=(name, together, keeps_memory, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    taken: dict[str, list[tuple[float, int]]] = {arm: [] for arm in ARMS}
    for _ in tqdm(range(WARM_UP + rounds), unit="round", desc=name):
        for arm, pipe in pipes.items():
            pipe.send(True)
            taken[arm].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(False)
        process.join()
    times = {arm: [seconds for seconds, _ in each[WARM_UP:]] for arm, each in taken.items()}
    first, *_ = times.values()
    return {
        arm: {
            "step_seconds": statistics.median(each),
            "ratio": statistics.median(before / after for before, after in zip(first, each)),
            "page_faults": statistics.median(faults for _, faults in taken[arm][WARM_UP:]),
        }
        for arm, each in times.items()
    }


def main(arguments: Sequence[str]) -> None:
    """Times the arms and prints the table."""
    given = parse(Arguments, arguments, __doc__)
    figures: dict[str, Any] = {name: measure(name, given.rounds) for name in given.configs}
    for name, arms in figures.items():
        for arm, each in arms.items():
            print(
                f"{name:<8} {arm:<26} {1000 * each['step_seconds']:6.1f} ms/step {each['ratio']:5.2f} x "
                f"{each['page_faults']:8.0f} page faults"
            )
    save_result("step", {"configs": figures})


if __name__ == "__main__":
    run(main)
