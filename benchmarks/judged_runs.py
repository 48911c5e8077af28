"""Runs of training that are judged along the way: several at a time, and they go on where they were stopped."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from measure import best_device
from quality import Judge, averages_of
from tqdm import tqdm

from uvit import Config
from uvit.common.errors import Interrupted, TrainingError
from uvit.common.files import make_directory, write_text
from uvit.config import CHECKPOINT_FOLDER, METRICS_FILE
from uvit.data.batch import ImageData
from uvit.data.loader import load_data
from uvit.networks.encoders import NO_ENCODERS
from uvit.networks.runtime import set_threads
from uvit.sampling.generate import generate
from uvit.training.trainer import Trainer

POINTS_FILE, LOG_FILE = "points.json", "log.txt"
TRAINING_SHARE = 0.8
"""About how much of a run's time is training, for a progress bar; the rest is drawing."""
POLL_SECONDS = 5


@dataclass(frozen=True)
class Run:
    """A run of training, some of whose averages are judged."""

    config: Config
    num_images: int
    folder: Path

    @property
    def points(self) -> list[dict[str, float]] | None:
        """Step and quality of its averages: none if training failed, and None if they are not there yet."""
        path = self.folder / POINTS_FILE
        return json.loads(path.read_text()) if path.is_file() else None

    def write_points(self, points: Sequence[Mapping[str, float]]) -> None:
        """Ends it with these figures; what has any is not trained again."""
        make_directory(self.folder)
        write_text(self.folder / POINTS_FILE, json.dumps(points, indent=1) + "\n")

    @property
    def share_done(self) -> float:
        """How much of it is done, for a progress bar."""
        if self.points is not None:
            return 1.0
        path = self.folder / METRICS_FILE
        steps = re.findall(r'"step": (\d+)', path.read_text()) if path.is_file() else []
        return TRAINING_SHARE * int(steps[-1]) / self.config.train.num_steps if steps else 0.0

    def train_and_judge(self, judge: Judge, data: ImageData) -> None:
        """Trains from its last checkpoint, then judges all checkpoints and removes them."""
        torch.compiler.reset()  # one process compiles many networks
        points = []
        with contextlib.suppress(TrainingError):  # a learning rate was too high
            Trainer(self.config, data, NO_ENCODERS, self.folder).train()
            for step, model in averages_of(self.folder, self.config, judge.device):
                if step % self.config.train.save_every == 0 or step == self.config.train.num_steps:
                    points.append({"step": step, **judge(generate(model, self.config, judge.labels, seed=0))})
        self.write_points(points)
        shutil.rmtree(self.folder / CHECKPOINT_FOLDER, ignore_errors=True)


def work(runs: Sequence[Run], num_taken: Any) -> None:
    """Does runs one after the other, in a process of its own.

    Args:
        runs: of one data set.
        num_taken: how many of them any process has taken, shared.
    """
    judge = data = None
    while True:
        with num_taken.get_lock():
            number = num_taken.value
            num_taken.value += 1
        if number >= len(runs):
            return
        each = runs[number]
        make_directory(each.folder)
        with open(each.folder / LOG_FILE, "a") as log:
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    set_threads(each.config.train.num_threads)
                    judge = judge or Judge(each.config, each.num_images, best_device())
                    data = data or load_data(each.config.data, each.config.model)
                    each.train_and_judge(judge, data)
            except (Interrupted, KeyboardInterrupt):
                sys.exit(1)


def do_all(runs: Sequence[Run], jobs: int, title: str, on_change: Callable[[], object]) -> None:
    """Does what is left of runs, in processes.

    Args:
        runs: of one data set.
        jobs: number of processes.
        title: for the progress bar.
        on_change: called when some have ended.

    Raises:
        TrainingError: a process failed.
    """
    left = [each for each in runs if each.points is None]
    context = multiprocessing.get_context("spawn")
    num_taken = context.Value("i", 0)
    workers = [context.Process(target=work, args=(left, num_taken)) for _ in range(min(jobs, len(left)))]
    num_done = len(runs) - len(left)
    progress = tqdm(total=len(runs), initial=num_done, unit="run", desc=title, smoothing=0, dynamic_ncols=True)
    try:
        for worker in workers:
            worker.start()
        running = list(workers)
        while running:
            wait([worker.sentinel for worker in running], timeout=POLL_SECONDS)
            running = [worker for worker in running if worker.is_alive()]
            if any(worker.exitcode for worker in workers):
                raise TrainingError(f"a run ended early: the newest {LOG_FILE} in {left[0].folder.parent} may say why")
            shares = [each.share_done for each in runs]
            progress.n = round(sum(shares), 2)
            progress.refresh()
            if shares.count(1) > num_done:
                num_done = shares.count(1)
                on_change()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()
        progress.close()
