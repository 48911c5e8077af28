"""Evaluates images drawn from a run, or those in a folder or an .npz.

`python evaluate.py --checkpoint runs/digits`, or `python evaluate.py --images FOLDER --reference DATA`;
`python evaluate.py stats DATA --output ref.npz` computes statistics to compare with.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from accelerate import PartialState

from uvit.commands.average import averaged_folder, warn_of_error
from uvit.common.cli import PROGRAM, parse, process_state
from uvit.common.errors import InputError
from uvit.common.files import atomic_write
from uvit.config import INCEPTION, MAX_BATCH, MAX_SIDE, MAX_WORKERS, DataConfig, Section
from uvit.data.batch import ImageSpec
from uvit.data.datasets import load_images
from uvit.evaluation.features import build_features
from uvit.evaluation.judge import ImageStatistics, read_with_progress
from uvit.evaluation.measure import BATCH_SIZE, MeasureArguments, measure
from uvit.evaluation.metrics import save_statistics
from uvit.evaluation.protocol import describe_features
from uvit.weights.averages import write_average
from uvit.weights.card import describe_figures


@dataclass(frozen=True, kw_only=True)
class StatisticsArguments(Section):
    data: tyro.conf.Positional[str]
    """Data set, folder of images, or .npz of images."""
    output: str
    """The .npz to write mu and sigma to."""
    split: str = "train"
    """Split of the data set."""
    image_size: int | None = None
    """Side in pixels that images are cropped to; None is that of the first image."""
    features: str = INCEPTION
    """`inception`, `timm:MODEL` or `pixels`."""
    feature_weights: str | None = None
    """File of the feature network's weights, if they cannot be downloaded."""
    batch_size: int = BATCH_SIZE
    """Images at a time."""
    num_workers: int = 0
    """Loader processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("output", Path(self.output).suffix == ".npz", "a path ending in .npz")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require("image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        self._require("image_size", (self.image_size or 1) <= MAX_SIDE, f"at most {MAX_SIDE:,}")
        self._require_at_most(batch_size=MAX_BATCH, num_workers=MAX_WORKERS)


def make_statistics(arguments: Sequence[str]) -> None:
    """Computes the statistics of a data set: `python evaluate.py stats DATA --output ref.npz`."""
    given = parse(StatisticsArguments, arguments, make_statistics.__doc__, "stats")
    shape = None if given.image_size is None else (3, given.image_size, given.image_size)
    source = DataConfig(name=given.data, train_split=given.split)
    data = load_images(source, ImageSpec(shape, labels=False, captions=False))
    network = build_features(given.features, given.feature_weights, data.shape)
    state, output = process_state(), Path(given.output)
    network.to(state.device)
    # The output is opened first, so that a path that cannot be written fails before the work, not after it.
    with atomic_write(output) if state.is_main_process else nullcontext(output) as temporary:
        batches = read_with_progress(data, given.batch_size, given.num_workers, state)
        moments = ImageStatistics(network, len(data), state).update(batches).moments
        if state.is_main_process:
            facts = {"features": given.features, "image_size": data.shape[1:], "num_images": moments.count}
            save_statistics(temporary, moments.gaussian, **facts, weights_hash=str(network.weights_hash))
    if state.is_main_process:
        details = f"{describe_features(given.features, network)}; statistics' hash {moments.gaussian.hash}"
        print(f"{moments.count} images of {given.data} to {given.output}: {details}")


def main(arguments: Sequence[str]) -> None:
    """Evaluates images, prints the figures with their protocol and saves both."""
    if list(arguments[:1]) == ["stats"]:
        make_statistics(arguments[1:])
        return
    given = parse(MeasureArguments, arguments, __doc__)
    state = process_state()
    # As for statistics, the output is opened first.
    with atomic_write(given.output_file) if state.is_main_process else nullcontext() as temporary:
        found = search_widths(given, state) if given.widths else measure_and_show(given, state)
        if temporary is not None:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


def measure_and_show(given: MeasureArguments, state: PartialState, stand_in: str | None = None) -> dict[str, Any]:
    """Evaluates images, and prints and returns the figures with their protocol.

    Args:
        given: what to measure.
        state: which process this is.
        stand_in: what the protocol calls a checkpoint in a temporary folder; None is its own name.
    """
    results, protocol = measure(given, state)
    if stand_in is not None:
        protocol["weights"] = protocol["weights"].replace(given.checkpoint, stand_in)
    if state.is_main_process:
        show(results, protocol)
    return {**results, "protocol": protocol}


def search_widths(given: MeasureArguments, state: PartialState) -> dict[str, Any]:
    """Evaluates averages of several widths of one run, and returns the figures of each and the best width."""
    run_dir, found = Path(given.checkpoint), {}
    for width in given.widths:
        with TemporaryDirectory() as folder:
            how = write_average(run_dir, Path(folder), width)
            if state.is_main_process:
                print(f"width {width:g}:")
                warn_of_error(how)
            one = dataclasses.replace(given, checkpoint=folder, widths=())
            name = str(averaged_folder(run_dir, width))
            try:
                found[width] = measure_and_show(one, state, name)
            except InputError as error:
                raise InputError(str(error).replace(folder, name)) from None
    best = min(found, key=lambda width: found[width].get("frechet", math.inf))
    if state.is_main_process:
        print(f"best width {best:g} by the Fréchet distance: {PROGRAM} average {given.checkpoint} --width {best:g}")
    return {"best": best, "widths": {f"{width:g}": each for width, each in found.items()}}


def show(results: dict[str, Any], protocol: dict[str, str]) -> None:
    """Prints the figures and the protocol."""
    for line in describe_figures(results, protocol):
        print(line)
    print("protocol: " + "; ".join(f"{name} {text}" for name, text in protocol.items()))
