"""Command lines: arguments into dataclasses, and a user's errors in one line."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from uvit.common.errors import InputError, Interrupted, TrainingError, one_line, printable

T = TypeVar("T")


def parse(
    cls: type[T], arguments: Sequence[str], description: str | None = None, operands: str = "", default: T | None = None
) -> T:
    """Parses `--section.field value` overrides into a dataclass; `--help` prints the help and exits.

    Args:
        cls: the dataclass.
        arguments: the command line without the program's name, which is that of `run`.
        description: what the program does, for the help.
        operands: what stands between the program's name and the options, for the help.
        default: the values that stand where the command line says nothing.

    Raises:
        InputError: an unknown option (with the nearest known one), or a value that does not fit.
    """
    printed = io.StringIO()
    settings: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                cls,
                args=list(arguments),
                prog=f"{Path(sys.argv[0]).name} {operands}".strip(),
                description=description,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
                **settings,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
    raise InputError(_flatten_box(printed.getvalue()))


def _flatten_box(box: str) -> str:
    """Flattens tyro's box of an error message: its first part, and the options it says were perhaps meant."""
    lines = [line.strip("│|").strip() for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"[─╭╮╰╯+-].*[─╭╮╰╯+-]{3,}", line)]
    start, end = (rules[0] + 1, rules[1]) if len(rules) > 1 else (0, len(lines))
    message = " ".join(line for line in lines[start:end] if line)
    _, _, suggestions = box.partition("Perhaps you meant")
    near = re.findall(r"(--[\w.-]+)", suggestions.partition("full helptext")[0])
    return message + (f", did you mean {near[0]}?" if near else "")


def process_state() -> PartialState:
    """Returns which process this is, on a CPU where ACCELERATE_USE_CPU asks for it (accelerate leaves that to us)."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_first_process() -> bool:
    """Tells, by the launcher's environment, whether this process is the one that writes; before any device starts."""
    return get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0


def _end_by_sigterm(*_: object) -> None:
    """Ends as an exception does, so that files being written are put away."""
    print("\nstopped by SIGTERM", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def run(main: Callable[[Sequence[str]], object]) -> None:
    """Runs a script's main on the command line, and turns what ends it into one line on standard error and a status.

    A user's error ends with 2; a run that cannot go on, with 1; Ctrl-C and SIGTERM with 130 and 143, after the files
    being written have been put away. What every process meets alike is printed by the first.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may lack letters
    signal.signal(signal.SIGTERM, _end_by_sigterm)
    try:
        main(sys.argv[1:])
    except InputError as error:
        # A loader's worker hands its error on with the traceback as text; the message is what follows the name.
        message = str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[2]
        print(f"error: {printable(one_line(message))}", file=sys.stderr)
        sys.exit(2)
    except (TrainingError, Interrupted) as end:
        if is_first_process():
            print(f"error: {end}" if isinstance(end, TrainingError) else end, file=sys.stderr)
        sys.exit(1 if isinstance(end, TrainingError) else 128 + end.signum)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
