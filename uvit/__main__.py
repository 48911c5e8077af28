"""`python -m uvit COMMAND …`: all commands, in a checkout or from an installed package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from uvit.common.cli import PROGRAM, run
from uvit.common.errors import InputError, did_you_mean

COMMANDS = {
    "train": "train a network from a config, or resume a run",
    "sample": "draw images from a run",
    "evaluate": "measure images drawn from a run, or any others",
    "encode": "encode images and captions once, before training",
    "app": "serve a web page that draws images from runs",
    "average": "rebuild an average of the weights of any width from a run that kept some",
    "convert": "convert published weights to safetensors",
    "export": "export a network to ONNX or torch.export's format",
    "push": "publish a run on the hub",
    "card": "write what push would publish",
}
"""The modules of `uvit.commands`, and what each does."""


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names; `--help` instead lists all commands.

    Raises:
        InputError: no such command, or an error of the command itself.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        for name, summary in COMMANDS.items():
            print(f"{name:<8} {summary}")
        print(f"{PROGRAM} COMMAND --help lists the options of each.")
        return
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) + did_you_mean(arguments[0], COMMANDS) if arguments else "nothing"
        raise InputError(f"the first argument must be one of {', '.join(COMMANDS)}, got {given}")
    command, *rest = arguments
    sys.argv = [f"{PROGRAM} {command}", *rest]  # the program's name in --help
    import_module(f"uvit.commands.{command}").main(rest)


if __name__ == "__main__":
    run(main)
