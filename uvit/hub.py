"""What comes from the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from glob import glob
from os.path import isdir
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import logging

from uvit.errors import InputError, did_you_mean


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from printing each retry: our own error says in one line what could not be had."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def find_folder(name: str, what: str, patterns: Sequence[str]) -> Path:
    """Returns a folder on disk, or one of the hub's, which is fetched once.

    Args:
        name: the folder, or on the hub `user/model`, or `user/model/folder` for a folder inside it.
        what: what it is to the user, for the error.
        patterns: names of the files wanted from the hub, `*` for any letters.

    Raises:
        InputError: nothing by that name that can be had.
    """
    path = Path(name)
    if isdir(path):
        return path
    # What has a folder on disk above it, or leads out of where it starts, is not meant for the hub.
    if path.is_absolute() or isdir(path.parent) or ".." in path.parts:
        folders = [str(path.parent / each).rstrip("/") for each in glob("*/", root_dir=path.parent)]
        raise InputError(f"{what} not found: {name}{did_you_mean(name, folders)}")
    repository, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
    try:
        with quiet_hub():
            return Path(snapshot_download(repository, allow_patterns=wanted)) / folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{what} {name!r} is no folder on disk, and the hub did not give it: {reason}") from None
