"""Options of the hub, apart from it: naming them does not load it."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict


class HubOptions(TypedDict, total=False):
    """How files are fetched from the hub."""

    revision: str | None
    """Branch, tag or commit; None is the head of the main branch."""
    token: str | bool | None
    """None and True use the token of `hf auth login` or HF_TOKEN, False uses none."""
    cache_dir: str | Path | None
    """Where files are cached; None is the hub's default folder."""
    local_files_only: bool
    """Whether to use only files that are cached already."""
