"""Changes the mathematics a little, many times, and counts the changes that the tests notice: `make mutants`.

Each mutant is one module with one change: another operator, comparison, number or word, a condition that always or
never holds, or a statement left out. The tests of the module then run in a process of their own until one fails. A
mutant that they do not notice is printed, unless tests/equivalent_mutants.txt says why it changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
MODULES = {
    "networks/attention": ["attention"],
    "networks/layers": ["layers", "uvit", "contract"],
    "networks/unet_layers": ["unet_layers", "unet"],
    "networks/backbone": ["contract", "uvit", "unet"],
    "networks/uvit": ["uvit", "contract", "sparse"],
    "networks/sparse": ["sparse"],
    "networks/unet": ["unet", "contract"],
    "diffusion/process": ["process"],
    "diffusion/objective": ["objective", "process"],
    "diffusion/average": ["average"],
    "diffusion/solvers": ["solvers", "samplers", "solvers_against_diffusers"],
    "diffusion/samplers": ["samplers", "solvers", "autoguidance"],
    "diffusion/reuse": ["reuse"],
    "sampling/generate": ["generate", "sparse", "autoguidance"],
    "evaluation/metrics": ["metrics"],
    "training/alignment": ["alignment", "alignment_run"],
    "training/optim": ["optim"],
    "training/sparse": ["sparse"],
    "training/resume": ["resume", "trainer"],
    "training/checkpoint": ["checkpoint", "resume"],
    "training/averages": ["averages", "sharding"],
    "weights/averages": ["averages"],
    "weights/state": ["checkpoint", "autoguidance"],
}
"""Modules of mathematics and state, and the tests that must notice their changes."""
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
}
PASSIVE = ("annotation", "returns", "decorator_list", "bases")
"""Fields of a node that compute nothing."""
TIMES_AS_LONG = 20
"""How many times as long as those of the unchanged module the tests of a mutant may run."""


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what may stand in the place of a part of a program."""
    changed = copy.deepcopy(node)
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.UnaryOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            changed.op = OPERATORS[type(op)]()
            yield changed
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.Compare(ops=[op]):
            changed.ops = [OPERATORS[type(op)]()]
            yield changed
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
            if value:
                yield ast.Constant(value * 0.5 if isinstance(value, float) else 0)
        case ast.If() | ast.IfExp():
            for holds in (True, False):
                changed = copy.deepcopy(node)
                changed.test = ast.Constant(holds)
                yield changed
        case ast.Call(keywords=[_, *_]):
            for number in range(len(node.keywords)):
                changed = copy.deepcopy(node)
                del changed.keywords[number]
                yield changed
        case ast.Call(args=[first, second, *_]) if not isinstance(first, ast.Starred | ast.Constant) and ast.dump(
            first
        ) != ast.dump(second):
            changed.args[:2] = [copy.deepcopy(second), copy.deepcopy(first)]
            yield changed
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield ast.Pass()
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yields a description of each change of a module, and the changed module."""
    tree, lines = ast.parse(source), ["", *source.splitlines()]
    for parent in _active(tree):
        for name, value in _parts(parent):
            for place, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or _is_message(parent, node):
                    continue
                for replacement in replacements(node):
                    ast.copy_location(replacement, node)
                    _put(parent, name, value, place, replacement)
                    change = f"{_shown(node)} -> {_shown(replacement)}"
                    text = ast.unparse(ast.fix_missing_locations(tree))
                    _put(parent, name, value, place, node)
                    number = getattr(node, "lineno", 0)
                    yield f"{number}: {change}, in `{lines[number].strip()}`", text


def _parts(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Yields the fields of a node that compute something, or none for a message or an import."""
    if not isinstance(node, ast.Raise | ast.JoinedStr | ast.arg | ast.Import | ast.ImportFrom):
        yield from (each for each in ast.iter_fields(node) if each[0] not in PASSIVE)


def _active(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and all below it that compute something."""
    yield node
    for _, value in _parts(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _active(child)


def _put(parent: ast.AST, name: str, value: object, place: int, node: ast.AST) -> None:
    if isinstance(value, list):
        value[place] = node
    else:
        setattr(parent, name, node)


def _is_message(parent: ast.AST, node: ast.AST) -> bool:
    """Returns whether a node is a docstring, or stands in the text of an error."""
    return isinstance(parent, ast.Expr) or (
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("InputError", "cast")
    )


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:100]


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module with another text."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        self.name, self.path, self.text = name, path, text

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.text.encode()


def passes(module: str, text: str, seconds: float) -> bool:
    """Returns whether the tests of a module pass with another text of it, in a forked process."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(max(1, int(seconds)))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        sys.meta_path.insert(0, Changed(f"uvit.{module.replace('/', '.')}", ROOT / f"uvit/{module}.py", text))
        tests = [str(ROOT / f"tests/test_{name}.py") for name in MODULES[module]]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests])))
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    """Runs the mutants, prints those that survive, and exits with 1 if they are too many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", nargs="*", default=list(MODULES), choices=list(MODULES), metavar="MODULE")
    parser.add_argument("--each", type=int, default=20, help="mutants of each module, chosen by --seed; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--killed", type=float, default=0.95, help="share that must be noticed")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import accelerate  # noqa: F401  # once, for all processes
    import diffusers  # noqa: F401
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    equivalent = dict(line.rsplit(" | ", 1) for line in EQUIVALENT.read_text().splitlines() if " | " in line)
    chosen = []
    for module in given.modules:
        found = list(mutants((ROOT / f"uvit/{module}.py").read_text()))
        random.Random(given.seed).shuffle(found)
        chosen += [(module, *each) for each in found[: given.each or len(found)]]
    limits, killed, excused, survivors = {}, 0, 0, []
    for module, change, text in tqdm(chosen, unit="mutant"):
        if module not in limits:
            started = time.monotonic()
            if not passes(module, (ROOT / f"uvit/{module}.py").read_text(), 3600):
                sys.exit(f"the tests of {module} do not pass as it is")
            limits[module] = TIMES_AS_LONG * (time.monotonic() - started)
        key = f"{module}: {change.partition(': ')[2]}"
        if key in equivalent:
            excused += 1
        elif passes(module, text, limits[module]):
            survivors.append(f"{module}.py:{change}")
            tqdm.write(f"not noticed: {survivors[-1]}")
        else:
            killed += 1
    share = killed / max(1, killed + len(survivors))
    print(f"{killed} of {killed + len(survivors)} mutants noticed ({share:.1%}), {excused} equivalent")
    sys.exit(share < given.killed)


if __name__ == "__main__":
    main()
