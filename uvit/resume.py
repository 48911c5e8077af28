"""How a run goes on: with its config, its place, its lines of metrics, and after writes that fail."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uvit.config import CONFIG_FILE, Config, from_dict, read_json
from uvit.errors import InputError
from uvit.files import append_lines, sync, write_text

METRICS_FILE = "metrics.jsonl"

# What may change when a run goes on; anything else would make it another run.
HARMLESS = {
    "model": {"attention", "gradient_checkpointing"},
    "process": set(),
    "data": {"num_workers", "test_split", "class_names", "on_error"},
    "optim": set(),
    "train": {
        "run_dir",
        "num_steps",
        "compile",
        "shard",
        "num_threads",
        "log_every",
        "sample_every",
        "save_every",
        "keep",
        "max_bad_steps",
        "resume_anyway",
        "tracker",
    },
    "sample": {field.name for field in dataclasses.fields(Config().sample)},
}


@dataclass
class Progress:
    """Where a run is between two log lines; with the state dicts, all that its future depends on."""

    loss_sum: float = 0.0
    """Sum of the losses since the last log line, each the mean over all processes."""
    loss_count: int = 0
    """How many there were: the steps since that line, without those left out."""
    bad_steps: int = 0
    """Steps in a row, the last one included, that were left out for a loss or gradient that is not finite."""
    good_step: int = 0
    """Step of the last checkpoint that no such step came right before; 0 for none."""
    num_processes: int = 1
    """Processes that shared the last step."""
    num_images: int = 0
    """Length of the data at the last step."""

    def count(self, loss: float, is_sound: bool, is_overflow: bool) -> None:
        """Takes note of a step.

        Args:
            loss: mean over all processes.
            is_sound: the update was made.
            is_overflow: it was left out, as half precision does until its scale is small enough: no fault of the run.
        """
        if is_sound or is_overflow:
            self.loss_sum += loss
            self.loss_count += 1
        if not is_overflow:
            self.bad_steps = 0 if is_sound else self.bad_steps + 1

    def take_loss(self) -> float:
        """Returns the mean loss since the last log line, NaN where no step counted, and begins anew."""
        mean = self.loss_sum / self.loss_count if self.loss_count else math.nan
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the values of a checkpoint.

        Raises:
            TypeError: not the fields of a Progress, or not of their types.
        """
        given = Progress(**state)
        for field in dataclasses.fields(self):
            if type(getattr(given, field.name)) is not type(field.default):
                raise TypeError(f"{field.name} {getattr(given, field.name)!r:.80}")
        self.__dict__.update(dataclasses.asdict(given))

    def state_dict(self) -> dict[str, Any]:
        """Returns the values, for a checkpoint."""
        return dataclasses.asdict(self)


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Returns what differs between two configs, each as `section.field WAS, got NOW`.

    Returns:
        Changes that make it another run, and harmless ones. More steps are harmless, though with a decay they change
        the learning rate of the steps to come: who trains on after a decay wants that.
    """
    other_run: list[str] = []
    harmless: list[str] = []
    for section, fields in HARMLESS.items():
        for field in dataclasses.fields(getattr(now, section)):
            was, value = (getattr(getattr(each, section), field.name) for each in (before, now))
            if was != value:
                (harmless if field.name in fields else other_run).append(
                    f"{section}.{field.name} {was!r}, got {value!r}"
                )
    return other_run, harmless


def check_same_run(config: Config, run_dir: Path, config_file: Path | None) -> list[str]:
    """Stops where the run folder holds a run that this config cannot go on with.

    Args:
        config: of the run to be.
        run_dir: its folder.
        config_file: what the folder's newest checkpoint was made with; None where there is none.

    Returns:
        What differs and is let pass: harmless changes, and with train.resume_anyway all.

    Raises:
        InputError: changes that make it another run.
    """
    before = None
    if (run_dir / "checkpoints").is_dir() and (run_dir / CONFIG_FILE).is_file():
        before = from_dict(Config, read_json(run_dir / CONFIG_FILE))  # a broken one is told of, not written anew
    if config_file is not None:
        before = from_dict(Config, read_json(config_file))
    if before is None:
        return []
    other_run, harmless = changes(before, config)
    if other_run and not config.train.resume_anyway:
        held = f"{run_dir} holds a run with {'; '.join(other_run)}"
        raise InputError(f"{held}: use another --train.run_dir, or --train.resume_anyway True")
    if config.optim.decay != "constant" and before.train.num_steps != config.train.num_steps:
        harmless.append(f"so the {config.optim.decay} decay of the learning rate ends at another step")
    return other_run + harmless


def tell(text: str) -> None:
    """Prints a line on standard error, above the bar."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def survive(what: str, errors: tuple[type[Exception], ...] = (OSError, InputError)) -> Iterator[None]:
    """Turns a failed write, such as on a full disk, into a warning: training can go on without it."""
    try:
        yield
    except errors as error:
        tell(f"warning: cannot write {what}, training goes on: {' '.join(str(error).split())}")


class MetricsFile:
    """metrics.jsonl, one object a line; lines that cannot be written wait for the next time.

    Args:
        path: the file.
        step: the last step that a run has done; later lines go, which it will write again.

    Raises:
        InputError: it cannot be read or written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.waiting = path, []  # type: Path, list[str]
        try:
            content = path.read_text(errors="replace") if path.is_file() else ""
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        whole = content[: content.rfind("\n") + 1]  # a kill may have cut the last line short
        kept = "".join(line for line in whole.splitlines(keepends=True) if _step_of(line) <= step)
        if kept != content:
            write_text(path, kept)

    def add(self, **values: Any) -> None:
        """Writes a line; numbers that JSON does not have become text.

        Raises:
            OSError: it cannot be written now.
        """
        plain = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self.waiting.append(json.dumps(plain))
        self.flush()

    def flush(self) -> None:
        """Writes the lines that wait.

        Raises:
            OSError: they cannot be written now.
        """
        append_lines(self.path, self.waiting)
        self.waiting.clear()

    def sync(self) -> None:
        """Writes the lines that wait and brings all to the disk, before a checkpoint that counts on them.

        Raises:
            OSError: that fails.
        """
        self.flush()
        sync(self.path)


def _step_of(line: str) -> float:
    """Returns the step of a line of ours; lines of others stay, as if they came before all steps."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return -math.inf
    return step if isinstance(step, (int, float)) else -math.inf
