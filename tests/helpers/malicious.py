"""Pickles that must never be unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = "this must never run"


class Malicious:
    """Calls a function when it is unpickled: by default, says so on standard output."""

    def __init__(self, function: Callable[..., Any] = print, argument: Any = WORDS) -> None:
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


PICKLE = pickle.dumps(Malicious(), protocol=2)


def write_malicious(path: Path, proof: Path) -> None:
    """Writes what makes `proof`, a folder, where it is unpickled, in the format that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trap = Malicious(Path.mkdir, proof)
    if path.suffix == ".npz":
        np.savez(path, **{name: np.array([trap], object) for name in ("arr_0", "arr_1", "mu", "sigma", "features")})
    elif path.suffix == ".npy":
        np.save(path, np.array([trap], object), allow_pickle=True)
    elif path.suffix in (".pth", ".pt", ".bin"):
        torch.save({"pos_embed": trap}, path)
    else:
        path.write_bytes(pickle.dumps(trap, protocol=2))
