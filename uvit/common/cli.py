"""Command lines: parses arguments into dataclasses, and reports user errors in one line."""

from __future__ import annotations

import contextlib
import io
import os
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
from uvit.common.files import remove_made

T = TypeVar("T")

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables in which launchers tell a process which one it is."""
PROGRAM = "python -m uvit"
"""What the commands of an installed package are called by."""


def parse(
    cls: type[T], arguments: Sequence[str], description: str | None = None, operands: str = "", default: T | None = None
) -> T:
    """Parses `--section.field value` overrides into a dataclass; `--help` prints the help and exits.

    Args:
        cls: the dataclass.
        arguments: the command line without the program's name, which is taken from sys.argv.
        description: what the program does, for the help.
        operands: positional arguments between the program's name and the options, for the help.
        default: values of the options that are not given.

    Raises:
        InputError: an unknown option (with the nearest known one), or an invalid value.
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
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
                use_underscores=True,
                **settings,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
    raise InputError(_flatten_box(printed.getvalue()))


def _flatten_box(box: str) -> str:
    """Flattens tyro's boxed error message into one line: its first part, and the first option that it suggests."""
    lines = [line.strip("│|").strip() for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"[─╭╮╰╯+-].*[─╭╮╰╯+-]{3,}", line)]
    start, end = (rules[0] + 1, rules[1]) if len(rules) > 1 else (0, len(lines))
    message = " ".join(line for line in lines[start:end] if line)
    message = re.sub(r"^Error parsing [\w.]+: ", "", message)  # the name of a dataclass or option
    _, _, suggestions = box.partition("Perhaps you meant")
    near = re.findall(r"(--[\w.-]+)", suggestions.partition("full helptext")[0])
    return message + (f", did you mean {near[0]}?" if near else "")


def command_line(name: str) -> str:
    """Returns how to call another command, like this one was called: `python -m uvit sample` or `python sample.py`."""
    return f"{PROGRAM} {name}" if sys.argv[0].startswith(PROGRAM) else f"python {name}.py"


def check_environment() -> None:
    """Checks the variables by which a launcher tells a process which one it is.

    Raises:
        InputError: one that is no number, or several processes of which this one does not know which it is.
    """
    for name in ("WORLD_SIZE", *RANKS):
        if not re.fullmatch(r"-?\d+|", os.environ.get(name, "")):
            raise InputError(f"environment variable {name} must be a whole number, got {os.environ[name]!r}")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not any(map(os.environ.get, RANKS)):
        given = f"got {os.environ['WORLD_SIZE']} and no RANK"
        raise InputError(f"environment variable WORLD_SIZE must be set by accelerate launch or torchrun, {given}")


def process_state() -> PartialState:
    """Returns this process's rank and device; accelerate leaves it to us to choose the CPU for ACCELERATE_USE_CPU.

    Raises:
        InputError: as check_environment.
    """
    check_environment()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_first_process() -> bool:
    """Returns whether this process has rank 0 and writes the files, by the environment: it starts no device."""
    return get_int_from_env(RANKS, 0) == 0


def _end_by_sigterm(*_: object) -> None:
    """Exits by an exception, so that files being written are cleaned up."""
    print("\nstopped by SIGTERM", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def run(main: Callable[[Sequence[str]], object]) -> None:
    """Runs a script's main on the command line; what stops it becomes one line on standard error and an exit status.

    The status is 2 for a user error, 1 for a run that cannot continue, 130 and 143 for Ctrl-C and SIGTERM, after files
    being written have been cleaned up. An error that all processes have in common is printed by the first only.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may lack characters
    signal.signal(signal.SIGTERM, _end_by_sigterm)
    try:
        main(sys.argv[1:])
    except InputError as error:
        remove_made()
        # A loader worker passes its error on with the traceback as text; the message follows the exception's name.
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
