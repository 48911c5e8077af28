"""Publishes a run on the hub: config, averaged weights, a card with its figures, and its newest grid of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from uvit.common.cli import parse
from uvit.config import Section
from uvit.integrations.publish import publish


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    source: tyro.conf.Positional[str]
    """Run folder, such as runs/digits, or a folder or file of weights."""
    name: tyro.conf.Positional[str]
    """Name on the hub, `user/model`; created if it does not exist."""
    private: bool | None = None
    """Whether a new model is private; by default as set in the account. With True, an existing public one is an
    error."""
    revision: str | None = None
    """Branch to push to, created if it does not exist; by default the main branch."""


def main(arguments: Sequence[str]) -> None:
    """Pushes what `card` would write."""
    given = parse(Arguments, arguments, __doc__)
    print(f"{given.source} to {publish(given.source, given.name, given.private, given.revision)}")
