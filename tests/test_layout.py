"""Modules import in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "uvit"

# What each module may import of ours: only what stands above it.
ORDER = [
    "errors",
    "interrupt",
    "files",
    "hub",
    "attention",
    "metrics",
    "grid",
    "config",
    "precision",
    "resume",
    "cli",
    "published",
    "weights",
    "latents",
    "sharding",
    "optim",
    "images",
    "features",
    "data",
    "latent_data",
    "loader",
    "diffusion",
    "samplers",
    "reuse",
    "card",
    "backbone",
    "generate",
    "publish",
    "integrations.export",
    "checkpoint",
    "integrations.diffusers",
    "evaluation",
    "integrations.demo",
    "__init__",
    "integrations.__init__",
    "integrations.timm",
]
# These take a callable, never the network itself.
NETWORK_FREE = ["diffusion", "samplers"]


def imports_of(name: str) -> set[str]:
    found = set()
    path = PACKAGE / f"{name.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uvit"):
            found.add(node.module.partition(".")[2] or "__init__")
    return found


def test_every_module_has_its_place():
    found = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    assert sorted(ORDER) == sorted(found)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    assert imports_of(name) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", NETWORK_FREE)
def test_process_and_solvers_do_not_know_the_network(name):
    assert "backbone" not in imports_of(name)
