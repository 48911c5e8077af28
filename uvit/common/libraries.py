"""Other libraries: their logs and progress bars silenced, their installed versions listed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
from collections.abc import Iterable, Iterator
from typing import Literal

Library = Literal["datasets", "diffusers", "huggingface_hub", "transformers", "xformers"]


@contextlib.contextmanager
def quiet(*libraries: Library) -> Iterator[None]:
    """Stops libraries from logging and from showing their own progress bars.

    Args:
        *libraries: which. huggingface_hub keeps its bars, since a download may take long.

    Raises:
        ImportError: datasets, diffusers or transformers is not installed.
    """
    with contextlib.ExitStack() as stack:
        for library in libraries:
            if library == "datasets":
                stack.enter_context(_datasets_without_bars())
            elif library in ("diffusers", "transformers"):
                stack.enter_context(_without_bars(library))
            stack.enter_context(_without_log(library))  # after the import, which sets the level
        yield


@contextlib.contextmanager
def _without_log(library: str) -> Iterator[None]:
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_bars(library: str) -> Iterator[None]:
    switches = importlib.import_module(f"{library}.utils.logging")
    were_enabled = switches.is_progress_bar_enabled()
    switches.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            switches.enable_progress_bar()


@contextlib.contextmanager
def _datasets_without_bars() -> Iterator[None]:
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def installed_versions(packages: Iterable[str]) -> list[str]:
    """Returns `NAME VERSION` of each package that is installed."""
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return found
