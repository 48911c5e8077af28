"""Whether two runs came to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.runs import lines_of_metrics

from uvit.training.checkpoint import load_checkpoint
from uvit.weights.tensors import read_weights


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name != "images_per_second"}
        for line in lines_of_metrics(run_dir)
    ]


def assert_same(one: Any, other: Any) -> None:
    """Two values are the same, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other):
            assert_same(ours, theirs)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders hold the same state, weights, metrics and grids, and nothing half-written."""
    assert_same(load_checkpoint(one), load_checkpoint(other))
    assert_same(read_weights(one / "model.safetensors"), read_weights(other / "model.safetensors"))
    assert metrics_of(one) == metrics_of(other)
    grids = [{path.name: path.read_bytes() for path in (run_dir / "samples").iterdir()} for run_dir in (one, other)]
    assert grids[0] == grids[1]
    for run_dir in (one, other):
        assert not [path for path in run_dir.rglob("*") if path.name.startswith(".")]


def assert_equal_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Two networks have the same weights."""
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
