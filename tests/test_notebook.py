"""docs/uvit_in_ten_minutes.ipynb runs, and its stored outputs are what it prints.

`python tests/test_notebook.py` runs it and stores the outputs in it.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "uvit_in_ten_minutes.ipynb"
TIMEOUT = 900
# A machine without widgets would print a warning with its paths; and the outputs are those of a CPU.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:IProgress not found", "ACCELERATE_USE_CPU": "true"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|mnt|work|Users|var)/|[A-Z]:\\\\|site-packages")


def execute(folder: Path) -> nbformat.NotebookNode:
    """Runs the notebook as from FOLDER/docs, with the configs beside it, and returns it with its outputs."""
    (folder / "docs").mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder / "docs")}},
    )
    return client.execute(env={**os.environ, **ENVIRONMENT})


def outputs(notebook: nbformat.NotebookNode) -> list[list[tuple[str, ...]]]:
    """Which kinds of output each code cell has, and what it prints, without the times on stderr."""

    def describe(output: nbformat.NotebookNode) -> tuple[str, ...]:
        name = output.get("name", "")
        return (output.output_type, name, output.text if name == "stdout" else "", *output.get("data", {}))

    return [sorted(map(describe, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_outputs_are_of_one_run_and_name_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert not MACHINE_PATH.search(NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_committed(tmp_path):
    assert outputs(execute(tmp_path)) == outputs(nbformat.read(NOTEBOOK, as_version=4))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(Path(folder)), NOTEBOOK)
