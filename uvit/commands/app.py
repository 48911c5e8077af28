"""Serves a web page that draws images from trained runs: `python app.py --runs runs`, then open the printed address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uvit.common.cli import parse
from uvit.common.errors import missing_package
from uvit.config import Section


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    runs: str = "runs"
    """Folder of the runs that the page can draw from."""
    host: str = "127.0.0.1"
    """Address to listen on: by default only for this machine; 0.0.0.0 is for everyone who can reach it."""
    port: int = 7860
    """Port to listen on; 0 is any free port."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("runs", bool(self.runs.strip()), "a folder")
        self._require("port", 0 <= self.port < 2**16, "0 to 65535")


def main(arguments: Sequence[str]) -> None:
    """Serves the page until Ctrl-C."""
    given = parse(Arguments, arguments, __doc__)
    try:
        from uvit.integrations.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise missing_package("the page", "gradio") from None
    serve(Path(given.runs), given.host, given.port)
