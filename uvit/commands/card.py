"""Writes the folder that push would publish, to check it first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

import tyro

from uvit.common.cli import parse
from uvit.common.errors import InputError
from uvit.common.files import atomic_folder
from uvit.config import Section
from uvit.integrations.publish import write_hub_folder


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    source: tyro.conf.Positional[str]
    """Run folder, such as runs/digits, or a folder or file of weights."""
    output: tyro.conf.Positional[str]
    """New folder for what would be published."""
    name: str = "user/model"
    """Name of the model in the card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("output", bool(self.output.strip()), "a folder")


def main(arguments: Sequence[str]) -> None:
    """Writes the folder atomically."""
    given = parse(Arguments, arguments, __doc__)
    output = Path(given.output)
    if lexists(output):
        raise InputError(f"the output must be a new folder, got {given.output}, which exists")
    with atomic_folder(output) as temporary:
        write_hub_folder(given.source, temporary, given.name)
    print(f"{given.source} to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
