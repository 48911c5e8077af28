"""Which room may know which, and what a room must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "uvit"

# What each room may import, besides itself: always rooms above it in this table.
RULES = {
    "common": "",
    "config": "common",
    "networks": "common config",
    "diffusion": "common config",
    "weights": "common config networks",
    "data": "common config networks weights",
    "sampling": "common config networks diffusion weights data",
    "training": "common config networks diffusion weights data sampling",
    "evaluation": "common config networks diffusion weights data sampling",
    "integrations": "common config networks diffusion weights data sampling",
    "commands": "common config networks diffusion weights data sampling training evaluation integrations",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
ROOMS = {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}
LONGEST = 350
LONGER = {"integrations/diffusers.py": 450, "networks/uvit.py": 420}


def imports_of(path: Path) -> list[str]:
    """Full names of the modules that a file imports, inside functions and for type checkers, too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports, its own included."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("uvit.")} & ROOMS


def test_every_room_has_its_rule():
    assert {*RULES} == ROOMS
    rooms = [*RULES]
    for number, (room, allowed) in enumerate(RULES.items()):
        assert {*allowed.split()} <= {*rooms[:number]}, room


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_what_its_room_may(path):
    room = path.relative_to(PACKAGE).parts[0]
    if room in RULES:
        assert rooms_of(path) <= {room, *RULES[room].split()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_fits_on_a_few_screens(path):
    limit = LONGER.get(path.relative_to(PACKAGE).as_posix(), LONGEST)
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("module", ["uvit", "unet", "unet_layers", "backbone"])
def test_a_network_knows_tensors_only(module):
    for name in imports_of(PACKAGE / f"networks/{module}.py"):
        known = ("torch", "einops", "timm", "uvit.config", "uvit.networks")
        assert name.split(".")[0] in sys.stdlib_module_names or name.startswith(known), name


def loaded_by(code: str) -> set[str]:
    """The modules of ours that a fresh interpreter has after running some code."""
    show = "import sys; print(*(name for name in sys.modules if name.startswith('uvit')))"
    shown = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return {*shown.stdout.split()}


def test_training_loads_neither_integrations_nor_evaluation_nor_the_hub():
    loaded = loaded_by("import uvit.commands.train")
    assert "uvit.training.trainer" in loaded
    assert not [name for name in loaded if name.startswith(("uvit.integrations", "uvit.evaluation", "uvit.common.hub"))]


def test_the_package_alone_loads_nothing_else():
    assert loaded_by("import uvit") == {"uvit"}
