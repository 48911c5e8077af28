from __future__ import annotations

from helpers.commands import run_python


def test_importing_prints_nothing_and_starts_nothing(tmp_path):
    code = "import uvit, torch; assert not torch.cuda.is_initialized()"
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
