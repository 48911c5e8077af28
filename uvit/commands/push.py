"""Publishes a run on the hub: config, averaged weights, a card with its figures, and its newest grid."""

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
    """Run folder, such as runs/digits, or weights alone."""
    name: tyro.conf.Positional[str]
    """Where to: `user/model`, which is made where there is none."""
    private: bool | None = None
    """Whether a model that is made is private, the account's default where not given; True refuses a public one."""
    revision: str | None = None
    """Branch to push to, made where there is none; the main one where not given."""


def main(arguments: Sequence[str]) -> None:
    """Pushes what `card` shows."""
    given = parse(Arguments, arguments, __doc__)
    print(f"{given.source} to {publish(given.source, given.name, given.private, given.revision)}")
