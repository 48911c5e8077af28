from __future__ import annotations

import pytest
from helpers.runs import ROOT

from uvit.common.errors import InputError
from uvit.config import load_config

BAD_FILES = [
    ("broken.json", '{"model": ', "is not valid JSON"),
    ("list.json", "[1, 2]", "must be a JSON object"),
    ("extra.json", '{"modle": {}}', "has no field 'modle', did you mean 'model'?"),
    ("nested.json", '{"model": {"dept": 4}}', "has no field 'dept', did you mean 'depth'?"),
    ("huge.json", '{"optim": {"lr": 1' + "0" * 400 + "}}", "lr must be float, got 1000"),
    ("type.json", '{"optim": {"lr": "fast"}}', "lr must be float, got 'fast'"),
    ("empty.py", "", r"must define `config = Config\(...\)`, got NoneType"),
    ("wrong.py", "config = {}", "must define"),
    ("crash.py", "1 / 0", "cannot be read as Python: ZeroDivisionError"),
    ("syntax.py", "config = (", "cannot be read as Python: SyntaxError"),
    ("odd.py", "from uvit import *\nconfig = Config(model=UViTConfig(depth=3))", "depth must be even"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_config_files(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / name)


def test_missing_config_file_names_the_nearest():
    with pytest.raises(InputError, match=r"not found: .*digit.py, did you mean '.*digits.py'"):
        load_config(ROOT / "configs" / "digit.py")
