"""Rebuilds an average of any width from a run that kept some: `python -m uvit average RUN --width 0.1`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

import tyro

from uvit.common.cli import command_line, parse
from uvit.common.errors import InputError
from uvit.common.files import atomic_folder
from uvit.common.messages import warn
from uvit.config import MAX_WIDTH, MIN_WIDTH, Section
from uvit.weights.averages import RebuiltAverage, write_average

LARGE_ERROR = 0.05
"""Of a fit: the average may differ visibly from one that was kept."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    run: tyro.conf.Positional[str]
    """Run folder, such as runs/digits, trained with --train.average_widths."""
    width: float
    """Relative width: the standard deviation of the updates that are averaged, in parts of all of them."""
    step: int | None = None
    """Training step of a snapshot, at which the average ends; by default the newest."""
    output: str | None = None
    """New run folder for the config and the weights; by default RUN-width-WIDTH."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("width", MIN_WIDTH <= self.width <= MAX_WIDTH, f"{MIN_WIDTH} to {MAX_WIDTH}")
        self._require("output", self.output is None or bool(self.output.strip()), "a folder")


def averaged_folder(run_dir: Path, width: float) -> Path:
    """Returns the folder beside a run that an average of it goes to by default."""
    named = run_dir if run_dir.name not in ("", "..") else run_dir.resolve()
    return named.with_name(f"{named.name}-width-{width:g}")


def warn_of_error(how: RebuiltAverage) -> None:
    """Warns of an average that is far from one that would have been kept."""
    if how.error > LARGE_ERROR:
        only = f"the snapshots only allow a fit of width {how.width:g} to {how.error:.0%}"
        warn(f"{only}: take more of them, or a width between those kept")


def main(arguments: Sequence[str]) -> None:
    """Rebuilds the average and writes the folder atomically."""
    given = parse(Arguments, arguments, __doc__)
    run_dir = Path(given.run)
    output = Path(given.output) if given.output else averaged_folder(run_dir, given.width)
    if lexists(output):
        raise InputError(f"the output must be a new folder, got {output}, which exists")
    with atomic_folder(output) as temporary:
        how = write_average(run_dir, temporary, given.width, given.step)
    warn_of_error(how)
    at = f"width {how.width:g} at step {how.step}, from {how.num_snapshots} snapshots, fitted to {how.error:.1e}"
    print(f"{given.run} to {output}: average of {at}; sample with: {command_line('sample')} --checkpoint {output}")
