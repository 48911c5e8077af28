"""`python -m uvit COMMAND …`: every command, from a checkout or an installed package alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from uvit.common.cli import run
from uvit.common.errors import InputError, did_you_mean

COMMANDS = {
    "train": "train a network from a config, or go on with a run",
    "sample": "draw images from a run",
    "evaluate": "measure the images of a run, or others",
    "encode": "encode images and captions once for all training",
    "app": "serve a page that draws from runs",
    "convert": "turn published weights into safetensors",
    "export": "write a network as ONNX or torch.export's file",
    "push": "publish a run on the hub",
    "card": "write what push would publish",
}
"""What each module of `uvit.commands` does."""
PROGRAM = "python -m uvit"


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names; `--help` in its place lists them.

    Raises:
        InputError: no such command, or as the command's own main.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        for name, does in COMMANDS.items():
            print(f"{name:<8} {does}")
        print(f"{PROGRAM} COMMAND --help lists the options of each.")
        return
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) + did_you_mean(arguments[0], COMMANDS) if arguments else "nothing"
        raise InputError(f"the first argument must be one of {', '.join(COMMANDS)}, got {given}")
    command, *rest = arguments
    sys.argv = [f"{PROGRAM} {command}", *rest]  # what --help calls the program
    import_module(f"uvit.commands.{command}").main(rest)


if __name__ == "__main__":
    run(main)
