"""The documentation: its examples run, its commands parse, and the names, links and pictures in it exist."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import shutil
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from docs import diagrams
from uvit import __version__
from uvit.__main__ import COMMANDS
from uvit.commands import app, average, card, convert, encode, evaluate, export, push, sample, train
from uvit.common.cli import parse
from uvit.config import Config
from uvit.evaluation.measure import MeasureArguments

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/*.md")]
}
REFERENCE = "docs/from_the_reference.md"
"""Its tables have the other repository's words in their first column."""
WITH_EXAMPLES = sorted(page for page, words in PAGES.items() if "```python" in words and page != "README.md")
SLURM = {"--signal", "--requeue", "--dependency"}
PARSERS = {
    "app": app.Arguments,
    "average": average.Arguments,
    "card": card.Arguments,
    "convert": convert.Arguments,
    "encode": encode.Arguments,
    "evaluate": MeasureArguments,
    "evaluate stats": evaluate.StatisticsArguments,
    "export": export.Arguments,
    "push": push.Arguments,
    "sample": sample.Arguments,
    "train": Config,
}
SCRIPTS = [path.name for path in ROOT.glob("*.py")]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def inline_code(page: str) -> list[str]:
    """Code inside sentences and tables, without the other repository's and the benchmarks' commands."""
    words = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    if page == REFERENCE:
        words = re.sub(r"^\|[^|]*\|", "|", words, flags=re.MULTILINE)
    return [code for code in re.findall(r"`([^`\n]+)`", words) if not code.startswith("python benchmarks/")]


def read_command(line: str) -> tuple[str, list[str]] | None:
    """Returns the command of ours that a line of a shell runs, and its arguments; None where it runs none."""
    words = shlex.split(line, comments=True)
    if words[1:3] == ["-m", "uvit"]:
        command, *arguments = words[3:]
    else:
        starts = [number for number, word in enumerate(words) if word in SCRIPTS]
        if not starts or words[0] not in ("python", "accelerate", "srun", "torchrun"):
            return None
        script, *arguments = words[starts[0] :]
        command = script.removesuffix(".py")
    if arguments and f"{command} {arguments[0]}" in PARSERS:
        return f"{command} {arguments[0]}", arguments[1:]
    return command, arguments


def commands() -> list[tuple[str, list[str]]]:
    """Every call of a command of ours in the pages."""
    lines = [line for page in PAGES for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()]
    return [found for line in lines if (found := read_command(line))]


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of our commands, and of the launchers."""
    known = set(SLURM) | {"--help"}
    for launcher in (launch_command_parser(), get_args_parser()):
        known |= set(launcher._option_string_actions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        for cls in PARSERS.values():
            known |= help_options(cls)
    return known


def help_options(cls: type) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parse(cls, ["--help"])
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
    assert {command for command, _ in commands()} == PARSERS.keys()
    assert {command.partition(" ")[0] for command in PARSERS} == COMMANDS.keys()
    assert {script.removesuffix(".py") for script in SCRIPTS} <= COMMANDS.keys()


@pytest.mark.parametrize(("command", "arguments"), commands(), ids=lambda value: " ".join(value)[:60])
def test_commands_parse(command, arguments, tmp_path, monkeypatch):
    if command == "train":
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
        (tmp_path / "configs/birds.py").write_text(blocks("docs/your_images.md", "python")[0])
        monkeypatch.chdir(tmp_path)
        assert isinstance(train.read_arguments(arguments), Config)
    else:
        assert isinstance(parse(PARSERS[command], arguments), PARSERS[command])


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page, options):
    named = {option for code in inline_code(page) for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)}
    assert named <= options, sorted(named - options)


def test_an_unknown_option_would_be_found(options):
    assert "--train.batch_size" in options and "--paper_scale" in options and "--nproc_per_node" in options
    assert "--train.batchsize" not in options and "--nnet_path" not in options


@pytest.mark.parametrize("page", PAGES)
def test_fields_of_configs_exist(page):
    config = Config()
    for code in inline_code(page):
        named = re.fullmatch(r"(model|process|data|optim|train|sample)\.(\w+)", code)
        if named and named[2] not in ("py", "json", "safetensors", "onnx"):
            assert hasattr(getattr(config, named[1]), named[2]), code


@pytest.mark.parametrize("page", PAGES)
def test_configs_that_are_named_exist(page):
    known = {path.stem for path in ROOT.glob("configs/*.py")} | {"birds", "NAME"}
    words = "\n".join(inline_code(page)) if page == REFERENCE else PAGES[page]
    assert set(re.findall(r"configs/(\w+)\.py", words)) <= known
    assert set(re.findall(r"^\w+_uvit_\w+$", "\n".join(inline_code(page)), re.MULTILINE)) <= known


def is_defined(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_named_exist(page):
    for name in re.findall(r"\buvit(?:\.\w+)+", "\n".join(inline_code(page))):
        assert is_defined(name), name


def test_stations_of_the_walks_exist():
    """In the page on the code, what is named after a link to a file stands in that file."""
    stations = re.findall(r"\]\(\.\./(uvit/[\w/]+)\.py\) `([\w.]+)`", PAGES["docs/reading.md"])
    assert len(stations) >= 15
    for module, name in stations:
        assert is_defined(f"{module.replace('/', '.')}.{name}"), f"{module} {name}"


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


def test_the_changelog_and_the_citation_are_of_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", changelog, re.MULTILINE)[0] == __version__
    moved = re.findall(r"^\| `uvit.*?\| (.*) \|$", changelog, re.MULTILINE)
    assert len(moved) >= 30
    for new in moved:
        for name in re.findall(r"`(uvit(?:\.\w+)+)`", new):
            assert is_defined(name), name
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text()


def test_pre_commit_runs_the_ruff_of_the_tests():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={repo['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("name", diagrams.PICTURES)
def test_pictures_are_what_the_script_draws(name):
    drawn = diagrams.PICTURES[name]()
    assert (ROOT / "docs" / name).read_text() == drawn, "run python docs/diagrams.py"


def test_the_list_of_files_is_what_the_script_writes():
    listed = f"{diagrams.BEGIN}{diagrams.list_files()}{diagrams.END}"
    assert listed in PAGES["docs/reading.md"], "run python docs/diagrams.py"


def rectangles(name: str, radius: int) -> list[tuple[float, ...]]:
    """Left, top, right and bottom of the boxes of a picture whose corners have a radius."""
    corner = rf'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="{radius}"'
    found = [map(float, each) for each in re.findall(corner, (ROOT / "docs" / name).read_text())]
    return [(x, y, x + width, y + height) for x, y, width, height in found]


@pytest.mark.parametrize(("name", "radius"), [("model.svg", 7), ("modules.svg", 7), ("modules.svg", 12)])
def test_boxes_of_pictures_do_not_overlap(name, radius):
    boxes = rectangles(name, radius)
    assert len(boxes) > 10
    for (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) in itertools.combinations(boxes, 2):
        assert right1 <= left2 or right2 <= left1 or bottom1 <= top2 or bottom2 <= top1


def test_each_module_is_drawn_inside_a_room():
    rooms, modules = rectangles("modules.svg", 12), rectangles("modules.svg", 7)
    assert len(rooms) == len(diagrams.read_rooms())
    assert len(modules) == sum(map(len, diagrams.read_rooms().values()))
    for left, top, right, bottom in modules:
        assert any(x1 < left and y1 < top and right < x2 and bottom < y2 for x1, y1, x2, y2 in rooms)


def test_what_a_room_is_for_fits_into_its_box():
    """Rooms that are not wide have it in their middle; a letter of its size is about 6 wide."""
    picture = (ROOT / "docs/modules.svg").read_text()
    centred = re.findall(r'<text x="(.*?)" y="(.*?)" font-size="12" .*? text-anchor="middle">(.*?)</text>', picture)
    assert centred
    for x, y, words in ((float(x), float(y), words) for x, y, words in centred):
        (room,) = [each for each in rectangles("modules.svg", 12) if each[0] < x < each[2] and each[1] < y < each[3]]
        assert room[0] < x - 3 * len(words) and x + 3 * len(words) < room[2], words


def test_the_picture_of_the_rooms_has_every_import():
    """Its arrows are the imports between rooms, but for those that a longer path implies."""
    graph = diagrams.read_imports()
    for room, files in diagrams.read_rooms().items():
        words = "\n".join(path.read_text() for path in files.values())
        imported = re.findall(r"^ *(?:from|import) uvit\.(\w+)", words, re.MULTILINE)
        assert graph[room] == {*imported} - {room}
    reduced = diagrams.reduce(graph)

    def reached(name: str) -> set[str]:
        return reduced[name].union(*map(reached, reduced[name]))

    for name, targets in graph.items():
        assert targets == reached(name) & targets and reduced[name] <= targets
    assert (ROOT / "docs/modules.svg").read_text().count("marker-end") == sum(map(len, reduced.values()))
    rows = diagrams.find_rows(reduced)
    assert all(rows[target][-1] < rows[name][0] for name, targets in reduced.items() for target in targets)
