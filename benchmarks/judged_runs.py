"""Runs of training that are judged along the way: several at a time, and they go on where they were stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import ROOT, best_device, log_scale, median_times, plain_config, plot_range
from quality import Judge, averages_of
from tqdm import tqdm

from uvit import Config
from uvit.common.errors import Interrupted, TrainingError
from uvit.common.files import atomic_write, make_directory, write_text
from uvit.common.signals import StopRequest
from uvit.config import (
    CHECKPOINT_FOLDER,
    METRICS_FILE,
    WEIGHTS_FILE,
    Compile,
    SampleConfig,
    from_dict,
    load_config,
    to_json,
)
from uvit.data.batch import ImageData
from uvit.data.loader import load_data
from uvit.networks.encoders import NO_ENCODERS
from uvit.networks.runtime import resolve_precision, set_up_process, tf32
from uvit.sampling.conditions import resolve_conditions
from uvit.sampling.generate import generate
from uvit.sampling.grid import image_grid
from uvit.sampling.runs import load_run
from uvit.training.trainer import Trainer

POINTS_FILE, LOG_FILE = "points.json", "log.txt"
TRAINING_SHARE = 0.8
"""About how much of a run's time is training, for a progress bar; the rest is drawing."""
POLL_SECONDS = 5
GRID_COLUMNS = 10
SPARE_CHECKPOINTS = 10
"""Kept besides those that are judged, for a run that is interrupted saves more."""
MAX_WARMUP = 0.1
"""Largest share of a run with a rising learning rate."""


Points = Sequence[Mapping[str, float]]
"""Step and quality of averages of a run."""


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

    def write_points(self, points: Points) -> None:
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


def unguided(sample: SampleConfig) -> SampleConfig:
    """Returns how images are drawn where recipes are compared; equal, also in saved figures, however it was guided."""
    return replace(sample, guidance=1.0, guidance_interval=(0.0, 1.0), reuse="none")


def study_config(name: str, fashion: str | None = None, compile: Compile = "no") -> Config:
    """Returns the plain recipe of configs/NAME.py for a study: one thread, no grids, no tracker, unguided images.

    Args:
        name: of the config.
        fashion: folder to read the images of `fashion` from; None is the name in its config.
        compile: how networks are compiled to train.
    """
    base = plain_config(name)
    train = replace(
        base.train,
        # All arms in one precision, whatever their widths.
        mixed_precision=resolve_precision(base.train.mixed_precision, best_device().type, base.model.width),
        num_threads=1,
        compile=compile,
        sample_every=0,
        tracker="none",
    )
    data = replace(base.data, name=fashion if name == "fashion" and fashion else base.data.name)
    sample = replace(unguided(base.sample), mixed_precision=train.mixed_precision)
    return replace(base, train=train, data=data, sample=sample)


def public_json(config: Config, name: str) -> dict[str, Any]:
    """Returns a recipe as JSON that names no folder of this machine, but the data of configs/NAME.py."""
    data = load_config(ROOT / "configs" / f"{name}.py").data
    return json.loads(to_json(replace(config, data=data)))


def same_settings(kept: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Tells whether figures were measured with these settings; fields that configs have since gained are defaults.

    Args:
        kept: with figures, with one config as `config` or some by their names as `configs`, in JSON.
        now: likewise.
    """

    def parsed(settings: dict[str, Any]) -> dict[str, Any]:
        configs = settings["configs"] if "configs" in settings else {"": settings["config"]}
        return {
            **settings,
            "config": None,
            "configs": {name: from_dict(Config, each) for name, each in configs.items()},
        }

    return kept is not None and parsed(kept) == parsed(now)


def plan(
    config: Config, label: str, folder: Path, *, num_steps: int, seed: int, num_points: int, num_images: int
) -> Run:
    """Plans a run of another length, whose average covers the same share of it.

    Args:
        config: the recipe.
        label: what the arm is called.
        folder: of the study; the run's is inside, with a name that tells recipes apart.
        num_steps: length of the run.
        seed: of training.
        num_points: steps, evenly spaced, whose averages are judged.
        num_images: images of each.
    """
    every, whole = math.ceil(num_steps / num_points), config.train
    ema_decay = max(0.0, 1 - (1 - whole.ema_decay) * whole.num_steps / num_steps)
    train = replace(whole, num_steps=num_steps, seed=seed, ema_decay=ema_decay, save_every=every)
    train = replace(train, keep=num_points + SPARE_CHECKPOINTS)
    optim = replace(config.optim, warmup_steps=min(config.optim.warmup_steps, math.ceil(MAX_WARMUP * num_steps)))
    config = replace(config, optim=optim, train=train)
    digest = hashlib.sha256(f"{num_images} {to_json(config)}".encode()).hexdigest()[:10]
    label = re.sub(r"\W+", "-", f"{label} {num_steps} steps lr {optim.lr:g} seed {seed}".lower())
    return Run(config, num_images, folder / f"{label}-{digest}")


def give_points(kept: Sequence[Mapping[str, Any]], planned: Mapping[tuple, Run], names: Sequence[str]) -> None:
    """Ends planned runs whose figures are kept: those of the same values of `names`."""
    for each in kept:
        key = tuple(each[name] for name in names)
        if key in planned:
            planned[key].write_points(each["points"])


def take_points(
    kept: Sequence[Mapping[str, Any]], planned: Mapping[tuple, Run], names: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Returns kept figures with those of planned runs that have ended, in the order of all but the last of `names`."""
    found = {tuple(each[name] for name in names): each for each in kept}
    for key, each in planned.items():
        if each.points:
            found[key] = {**dict(zip(names, key)), "points": each.points}
    return [found[key] for key in sorted(found, key=lambda key: key[:-1])]


def time_steps(configs: Mapping[str, Config], data: ImageData, rounds: int) -> dict[str, float]:
    """Returns the median seconds of a training step of each config, with the configs in turn."""
    steps: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder, tf32(), tqdm(total=rounds, unit="round", desc="timing") as progress:
        for name, config in configs.items():
            trainer = Trainer(config, data, NO_ENCODERS, Path(folder))
            trainer.build()
            trainer.resume(())
            steps[name] = partial(trainer.step, StopRequest())
        return median_times(steps, rounds, warm_up=5, on_round=progress.update)


def draw_samples(arms: Mapping[str, Run], path: Path) -> None:
    """Draws a row for each arm whose run was trained here, from the same noise, for the same labels."""
    rows = {}
    for arm, each in arms.items():
        if each.points and (each.folder / WEIGHTS_FILE).is_file():
            labels = resolve_conditions(each.config)
            wanted = [labels[column % len(labels)] for column in range(GRID_COLUMNS)]
            config, model = load_run(str(each.folder), "auto", best_device())
            rows[arm] = generate(model, config, wanted, seed=0)
    if rows:
        with atomic_write(path) as temporary:
            image_grid(torch.cat([*rows.values()]), GRID_COLUMNS, [*rows]).save(temporary)


def plot_quality(
    axes_of: Mapping[str, Any],
    runs: Sequence[Points],
    x_of: Callable[[Mapping[str, float]], float],
    label: str,
    **style: Any,
) -> None:
    """Plots qualities of an arm over its training, the median and range of its runs.

    Args:
        axes_of: of matplotlib, by quality.
        runs: points of each.
        x_of: the place of a point.
        label: for the legend.
        **style: of the median's line.
    """
    by_step = [{point["step"]: point for point in points} for points in runs]
    common = sorted(set.intersection(*map(set, by_step)))  # one that was interrupted may lack the first
    for quality, axes in axes_of.items():
        curves = [[points[step][quality] for step in common] for points in by_step]
        plot_range(axes, [x_of(by_step[0][step]) for step in common], curves, label, **style)


def draw_quality(path: Path, title: str, xlabel: str, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws the distance and what is recognised side by side, for each arm that has runs.

    Args:
        path: picture to write.
        title: what was trained.
        xlabel: what training is measured in.
        arms: of each the arguments of `plot_quality` but the axes and the label.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    distance, recognised = figure.subplots(1, 2)
    for arm, each in arms.items():
        if each["runs"]:
            plot_quality({"frechet_ratio": distance, "recognised": recognised}, label=arm, **each)
    distance.set(xlabel=xlabel, ylabel="Fréchet distance / real")
    log_scale(distance)
    recognised.set(xlabel=xlabel, ylabel="recognised as the class asked for")
    for axes in (distance, recognised):
        axes.grid(alpha=0.3)
    figure.legend(*distance.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{title}: median and range of the seeds")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


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
                    set_up_process(each.config.train.num_threads)
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
