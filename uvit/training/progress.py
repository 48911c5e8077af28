"""What a run counts and writes down as it goes: its place, its lines of metrics, its rate."""

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
    """Where a run is between two log lines; with the state dicts, all that its future depends on."""

    loss_sum: float = 0.0
    """Sum of the losses since the last log line, each the mean over all processes."""
    loss_count: int = 0
    """How many there were: the steps since that line, without those left out."""
    bad_steps: int = 0
    """Steps in a row, the last one included, that were left out because a loss or gradient was not finite."""
    good_step: int = 0
    """Step of the last checkpoint that no such step came right before; 0 for none."""
    num_processes: int = 1
    """Processes that shared the last step."""
    num_images: int = 0
    """Length of the data at the last step."""

    def record(self, loss: float, is_sound: bool, is_overflow: bool) -> None:
        """Records a step.

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

    def pop_mean_loss(self) -> float:
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


class MetricsFile:
    """metrics.jsonl, one object a line; lines that cannot be written wait for the next time.

    Args:
        path: the file.
        step: the last step that a run has done; later lines go, which it will write again.

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


class Stopwatch:
    """Times steps, without what is not a step.

    Args:
        step: steps done when it starts.
    """

    def __init__(self, step: int) -> None:
        self._start, self._step = time.perf_counter(), step

    def steps_per_second(self, step: int) -> float:
        """Returns the rate since the last call, or the start, and begins anew."""
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._start)
        self._start, self._step = now, step
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that a block takes."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before
