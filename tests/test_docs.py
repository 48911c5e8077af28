"""What the documentation says: its examples run, its commands parse, its links and pictures are there."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import test_layout
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import app
import encode
import evaluate
import sample
import train
from uvit import checkpoint
from uvit.common.cli import parse
from uvit.config import Config
from uvit.integrations.export import ExportArguments

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
DIAGRAMS = runpy.run_path(str(ROOT / "docs/diagrams.py"))
REFERENCE = "docs/from_the_reference.md"
"""Whose tables have the other repository's words in their first column."""
WITH_EXAMPLES = sorted(page for page, words in PAGES.items() if "```python" in words and page != "README.md")
SLURM = {"--signal", "--requeue", "--dependency"}
PARSERS = {
    "app.py": app.Arguments,
    "sample.py": sample.Arguments,
    "evaluate.py": evaluate.Arguments,
    "evaluate.py stats": evaluate.StatisticsArguments,
    "encode.py": encode.Arguments,
    "uvit.checkpoint convert": checkpoint.ConvertArguments,
    "uvit.checkpoint push": checkpoint.PushArguments,
    "uvit.checkpoint card": checkpoint.CardArguments,
    "uvit.checkpoint export": ExportArguments,
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def inline_code(page: str) -> list[str]:
    """Words in code inside of sentences and tables, but for those of the other repository and the benchmarks."""
    words = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    if page == REFERENCE:
        words = re.sub(r"^\|[^|]*\|", "|", words, flags=re.MULTILINE)
    return [code for code in re.findall(r"`([^`\n]+)`", words) if not code.startswith("python benchmarks/")]


def commands() -> list[tuple[str, list[str]]]:
    """Every call of a command of ours in the pages: the command, and its arguments."""
    found = []
    for page in PAGES:
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [n for n, word in enumerate(words) if word in (*PARSERS, "train.py", "uvit.checkpoint")]
            if starts and words[0] in ("python", "accelerate", "srun", "torchrun"):
                command, *arguments = words[starts[0] :]
                if f"{command} {arguments[0]}" in PARSERS:
                    command, arguments = f"{command} {arguments[0]}", arguments[1:]
                found.append((command, arguments))
    return found


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of our commands, and of the launchers."""
    known = set(SLURM) | {"--help"}
    for launcher in (launch_command_parser(), get_args_parser()):
        known |= set(launcher._option_string_actions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        for cls in (Config, *PARSERS.values()):
            known |= help_options(cls)
    return known


def help_options(cls: type) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parse(cls, ["--help"], "", "")
    return set(re.findall(r"--[a-z][\w.]*", printed.getvalue()))


@pytest.mark.parametrize("page", WITH_EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_examples_run_as_they_stand(page, tmp_path, monkeypatch):
    """One after the other in one folder, with few steps."""
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks(page, "python")):
        code = re.sub(r"^NUM_STEPS = \d+$", "NUM_STEPS = 3", block, flags=re.MULTILINE)
        exec(compile(code, f"{page}, example {number}", "exec"), {"__name__": "__main__"})


def test_there_are_examples_and_commands():
    assert {"docs/import.md", "docs/your_images.md", "docs/imagenet256.md", REFERENCE} <= {*WITH_EXAMPLES}
    assert len(commands()) >= 25
    assert {command for command, _ in commands()} >= {"train.py", "sample.py", "evaluate.py", "encode.py", "app.py"}


@pytest.mark.parametrize(("command", "arguments"), commands(), ids=lambda value: " ".join(value)[:60])
def test_commands_parse(command, arguments, tmp_path, monkeypatch):
    if command == "train.py":
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
        (tmp_path / "configs/birds.py").write_text(blocks("docs/your_images.md", "python")[0])
        monkeypatch.chdir(tmp_path)
        assert isinstance(train.read_arguments(arguments), Config)
    else:
        assert isinstance(parse(PARSERS[command], arguments, command, ""), PARSERS[command])


@pytest.mark.parametrize("page", PAGES)
def test_options_are_those_of_the_parsers(page, options):
    named = {option for code in inline_code(page) for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)}
    assert named <= options, sorted(named - options)


def test_an_option_that_is_none_would_be_found(options):
    assert "--train.batch_size" in options and "--paper_scale" in options and "--nproc_per_node" in options
    assert "--train.batchsize" not in options and "--nnet_path" not in options


@pytest.mark.parametrize("page", PAGES)
def test_fields_of_configs_exist(page):
    config = Config()
    for code in inline_code(page):
        named = re.fullmatch(r"(model|process|data|optim|train|sample)\.(\w+)", code)
        if named and named[2] not in ("py", "safetensors", "onnx"):
            assert hasattr(getattr(config, named[1]), named[2]), code


@pytest.mark.parametrize("page", PAGES)
def test_configs_that_are_named_exist(page):
    known = {path.stem for path in ROOT.glob("configs/*.py")} | {"birds", "NAME"}
    words = "\n".join(inline_code(page)) if page == REFERENCE else PAGES[page]
    assert set(re.findall(r"configs/(\w+)\.py", words)) <= known
    assert set(re.findall(r"^\w+_uvit_\w+$", "\n".join(inline_code(page)), re.MULTILINE)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings], target


@pytest.mark.parametrize("name", DIAGRAMS["PICTURES"])
def test_pictures_are_what_the_script_draws(name):
    drawn = DIAGRAMS["PICTURES"][name]()
    assert (ROOT / "docs" / name).read_text() == drawn, "run python docs/diagrams.py"


@pytest.mark.parametrize("name", DIAGRAMS["PICTURES"])
def test_boxes_of_pictures_do_not_overlap(name):
    corner = r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="7"'
    boxes = [tuple(map(float, found)) for found in re.findall(corner, (ROOT / "docs" / name).read_text())]
    assert len(boxes) > 20
    for (x1, y1, width1, height1), (x2, y2, width2, height2) in itertools.combinations(boxes, 2):
        assert x1 + width1 <= x2 or x2 + width2 <= x1 or y1 + height1 <= y2 or y2 + height2 <= y1


def test_the_picture_of_the_modules_has_every_import():
    """Its arrows are the imports that the test of the layout reads, but for those that a longer way implies."""
    graph = DIAGRAMS["read_modules"]()
    for name in test_layout.ORDER:
        if not name.endswith("__init__"):
            assert graph[name] == test_layout.imports_of(name) - {"__init__"}, name
    reduced = DIAGRAMS["reduce"](graph)

    def reached(name: str) -> set[str]:
        return reduced[name].union(*map(reached, reduced[name]))

    for name, targets in graph.items():
        assert targets <= reached(name) and reduced[name] <= targets
    levels = DIAGRAMS["layers_of"](graph)
    assert all(levels[target] < levels[name] for name, targets in graph.items() for target in targets)
