"""The examples in docstrings run as they stand, in a folder that has the files which they name."""

from __future__ import annotations

import doctest
import shutil
from importlib import import_module

import pytest
import torch
from helpers.runs import ROOT

from uvit import UViT
from uvit.weights.published import PUBLISHED

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("uvit/**/*.py"))
    if ">>> " in path.read_text()
]


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A folder with a run of digits and a published file."""
    shutil.copytree(trained / "runs/tiny", tmp_path / "runs/digits")
    with torch.device("meta"):  # random weights take long
        shapes = UViT(PUBLISHED["cifar10_uvit_small"]).state_dict()
    torch.save({name: torch.zeros(each.shape) for name, each in shapes.items()}, tmp_path / "cifar10_uvit_small.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_examples():
    assert {"uvit.networks.uvit", "uvit.integrations.diffusers", "uvit.integrations.timm"} <= {*MODULES}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("folder")
def test_examples_run(name, capsys):
    module = import_module(name)
    # A reader has what the module defines, and must be told to import the rest.
    own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
    found = [test for test in doctest.DocTestFinder().find(module, globs=own) if test.examples]
    assert found
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
