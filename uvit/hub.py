"""What talks to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub.utils import logging


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from printing each retry: our own error says in one line what could not be had."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
