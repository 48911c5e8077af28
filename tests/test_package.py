"""`import uvit`: little is loaded, and nothing happens."""

from __future__ import annotations

import pytest
from helpers.commands import run_python

import uvit


def test_names_are_imported_on_first_use_and_nothing_is_printed_or_started(tmp_path):
    code = """
import sys, uvit
assert {*uvit.__all__} <= {*dir(uvit)}
uvit.Config, uvit.UViTConfig
assert "torch" not in sys.modules and "uvit.networks" not in sys.modules
uvit.UViT, uvit.build_network
assert not sys.modules["torch"].cuda.is_initialized() and "uvit.common.hub" not in sys.modules
"""
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_star_import_gives_the_public_names():
    names = {}
    exec("from uvit import *", names)
    assert (
        {*names} - {"__builtins__"}
        == {*uvit.__all__}
        == {
            "Config",
            "UNet",
            "UNetConfig",
            "UViT",
            "UViTConfig",
            "build_network",
        }
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'uvit' has no attribute 'UVit'"):
        uvit.UVit  # noqa: B018
