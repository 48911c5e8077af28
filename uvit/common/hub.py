"""Fetches from and pushes to the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import glob
from os.path import exists, isdir
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from typing_extensions import Unpack

from uvit.common.errors import InputError, did_you_mean
from uvit.common.libraries import quiet
from uvit.common.options import HubOptions

REVISION = re.compile(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*")


def _reason(error: Exception) -> str:
    """Returns in one line why the hub refused."""
    if isinstance(error, GatedRepoError):
        return "its owner must grant access: ask for it on its page, then log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or log in with `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know this login: log in again with `hf auth login`"
    if status == 403:
        return "this login has no permission for it: check the name and the token's rights"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)  # the first line says why


def find_folder(name: str, what: str, patterns: Sequence[str], **options: Unpack[HubOptions]) -> Path:
    """Returns a folder on disk, or one from the hub, which is fetched once.

    Args:
        name: path of the folder, or on the hub `user/model`, or `user/model/folder` for a folder inside it, with an
            optional `@REVISION` at the end: a branch, tag or commit.
        what: what to call it in an error.
        patterns: names of the files to fetch from the hub, `*` for any characters.
        **options: HubOptions; `revision` only where the name does not give it.

    Raises:
        InputError: nothing found by that name, or a revision given for a folder on disk.
    """
    path, revision = Path(name), options.pop("revision", None)
    if revision is not None and exists(path):
        raise InputError(f"revision must be None for what is on disk, got {revision!r} for {name}")
    if isdir(path):
        return path
    # A name whose parent is a folder on disk, or that contains "..", is not meant for the hub.
    if path.is_absolute() or isdir(path.parent) or ".." in path.parts:
        folders = [str(path.parent / each).rstrip("/") for each in glob("*/", root_dir=path.parent)]
        raise InputError(f"{what} not found: {name}{did_you_mean(name, folders)}")
    name = name if revision is None else f"{name}@{revision}"
    path_on_hub, at, revision = name.partition("@")
    if at and not REVISION.fullmatch(revision):
        raise InputError(f"a revision must be a branch, tag or commit of the hub's, got {revision!r} in {name}")
    repository, folder = "/".join(path_on_hub.split("/")[:2]), "/".join(path_on_hub.split("/")[2:])
    allowed = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
    try:
        with quiet("huggingface_hub"):
            found = snapshot_download(
                repository, revision=revision or None, allow_patterns=allowed, **cast(Any, options)
            )
    except (ValueError, HTTPError, OSError) as error:
        raise InputError(
            f"{what} {name!r} is not a folder on disk, and cannot be fetched from the hub: {_reason(error)}"
        ) from None
    return Path(found) / folder


def push_folder(
    folder: Path,
    name: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Pushes the files of a folder to a model repository on the hub, in one commit.

    Args:
        folder: what to push.
        name: `user/model`; the repository is created if it does not exist.
        message: of the commit.
        private: whether a new repository is private; None is the account's default. An existing one stays as it is:
            with True, a public one is an error.
        revision: branch to push to, created if it does not exist; None is the main branch.
        token: access token; None uses that of `hf auth login` or HF_TOKEN.

    Returns:
        The URL of the commit.

    Raises:
        InputError: an invalid name, no login, no permission, no connection, or a public repository where `private` is
            True.
    """
    if name.count("/") != 1:
        raise InputError(f"the name on the hub must be USER/MODEL, got {name!r}")
    if revision is not None and not REVISION.fullmatch(revision):
        raise InputError(f"a revision must be a branch, tag or commit of the hub's, got {revision!r}")
    if token is None and get_token() is None:
        raise InputError(
            f"pushing to {name!r} needs a login to the hub, got none: run `hf auth login`, or set HF_TOKEN"
        )
    try:
        with quiet("huggingface_hub"):
            api = HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            if private and not api.model_info(name).private:
                raise InputError("private must be None or False for a repository that is public, got True")
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    except (ValueError, HTTPError, OSError) as error:
        raise InputError(f"cannot push {name!r} to the hub: {_reason(error)}") from None
    return str(commit.commit_url)
