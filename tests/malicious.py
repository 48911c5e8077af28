"""A pickle that must never be unpickled."""

from __future__ import annotations

import pickle

WORDS = "this must never run"


class Malicious:
    def __reduce__(self):
        return print, (WORDS,)


PICKLE = pickle.dumps(Malicious(), protocol=2)
