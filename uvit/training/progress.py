"""What a run counts and records as it trains: progress, metrics and speed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvit.common.errors import InputError
from uvit.common.files import append_lines, sync, write_text


@dataclass
class Progress:
    """The counters of a run; with the state dicts, all that its further course depends on."""

    loss_sum: float = 0.0
    """Sum of the losses since the last log line, each the mean over all processes."""
    loss_count: int = 0
    """Number of these losses: the steps since that line, without skipped ones."""
    bad_steps: int = 0
    """Number of steps in a row, up to the last one, that were skipped because a loss or gradient was not finite."""
    good_step: int = 0
    """Step of the last checkpoint that was not saved right after such a step; 0 for none."""
    num_processes: int = 1
    """Number of processes at the last step."""
    num_images: int = 0
    """Length of the data set at the last step."""
    num_absent: int = 0
    """Tokens that the weights of `train.init` lacked, which fade in."""

    def record(self, loss: float, is_sound: bool, is_overflow: bool) -> None:
        """Records a step.

        Args:
            loss: mean over all processes.
            is_sound: whether the update was made.
            is_overflow: whether fp16 overflowed, as it does until its scale is small enough: not a fault of the run.
        """
        if is_sound or is_overflow:
            self.loss_sum += loss
            self.loss_count += 1
        if not is_overflow:
            self.bad_steps = 0 if is_sound else self.bad_steps + 1

    def pop_mean_loss(self) -> float:
        """Returns the mean loss since the last log line, NaN where there is none, and resets it."""
        mean = self.loss_sum / self.loss_count if self.loss_count else math.nan
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the values from a checkpoint.

        Raises:
            TypeError: other fields than those of a Progress, or of other types.
        """
        given = Progress(**state)
        for field in dataclasses.fields(self):
            if type(getattr(given, field.name)) is not type(field.default):
                raise TypeError(f"{field.name} {getattr(given, field.name)!r:.80}")
        self.__dict__.update(dataclasses.asdict(given))

    def state_dict(self) -> dict[str, Any]:
        """Returns the values, for a checkpoint."""
        return dataclasses.asdict(self)


class MetricsFile:
    """metrics.jsonl, one object per line; lines that cannot be written are kept and written later.

    Args:
        path: the file.
        step: the step that the run resumes from; lines of later steps are removed, since they will be written again.

    Raises:
        InputError: it cannot be read or written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.waiting: list[str] = []
        try:
            content = path.read_text(errors="replace") if path.is_file() else ""
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        whole = content[: content.rfind("\n") + 1]  # a kill may have cut the last line short
        kept = "".join(line for line in whole.splitlines(keepends=True) if _step_of(line) <= step)
        if kept != content:
            write_text(path, kept)

    def add(self, **values: Any) -> None:
        """Writes a line; NaN and infinity, which JSON does not have, become text.

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
        """Writes the waiting lines.

        Raises:
            OSError: they cannot be written now.
        """
        append_lines(self.path, self.waiting)
        self.waiting.clear()

    def sync(self) -> None:
        """Writes the waiting lines and flushes the file to disk, before the checkpoint of their steps.

        Raises:
            OSError: they cannot be written now.
        """
        self.flush()
        sync(self.path)


def _step_of(line: str) -> float:
    """Returns the step of a line; -inf for a line of another kind, which is kept like one before all steps."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return -math.inf
    return step if isinstance(step, (int, float)) else -math.inf


class Stopwatch:
    """Measures steps per second, without the time of paused blocks.

    Args:
        step: steps done at the start.
    """

    def __init__(self, step: int) -> None:
        self._start, self._step = time.perf_counter(), step

    def steps_per_second(self, step: int) -> float:
        """Returns the rate since the last call, or the start, and restarts."""
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._start)
        self._start, self._step = now, step
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time that a block takes."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before
