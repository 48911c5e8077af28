from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from uvit.common.errors import InputError
from uvit.config import Section, from_dict, read_json, replace_fields, save_json, to_json


@dataclass(frozen=True, kw_only=True)
class Inner(Section):
    name: str = "a"
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer(Section):
    count: int
    kind: Literal["one", "two"] = "one"
    pair: tuple[int, int] = (1, 2)
    words: tuple[str, ...] = ()
    other: int | None = None
    inner: Inner = field(default_factory=Inner)


WHOLE = Outer(count=3, kind="two", pair=(4, 5), words=("x", "y"), other=7, inner=Inner(name="b", share=1))


def test_json_and_back():
    text = to_json(WHOLE)
    assert text.endswith("}\n") and json.loads(text)["inner"] == {"name": "b", "share": 1}
    assert from_dict(Outer, json.loads(text)) == WHOLE
    assert from_dict(Outer, {"count": 1}) == Outer(count=1)


def test_a_written_section_notices_changes(tmp_path):
    path = tmp_path / "outer.json"
    save_json(path, WHOLE)
    assert from_dict(Outer, read_json(path)) == WHOLE
    text = path.read_text()
    for place in range(len(text)):
        if text[place].isalnum():
            path.write_text(text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :])
            with pytest.raises(
                InputError, match=r"was changed since it was written, its uvit_hash|is not valid JSON|has no field"
            ):
                from_dict(Outer, read_json(path))
                pytest.fail(f"not noticed: {text[place - 5 : place + 5]}")
    path.write_text(to_json(WHOLE))  # written by hand, or by an older version
    assert from_dict(Outer, read_json(path)) == WHOLE


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], r"Outer must be a JSON object, got \[\]"),
        ({}, "Outer must have a field 'count', got none"),
        ({"kind": "one"}, "Outer must have a field 'count', got kind"),
        ({"count": 1, "coutn": 2}, "Outer has no field 'coutn', did you mean 'count'?"),
        ({"count": 1, "inner": {"nam": "x"}}, "Inner has no field 'nam', did you mean 'name'?"),
        ({"count": 1, "inner": 5}, "Inner must be a JSON object, got 5"),
        ({"count": True}, "count must be int, got True"),
        ({"count": 1.0}, "count must be int, got 1.0"),
        ({"count": 2**63}, "count must be below 9223372036854775808 in size"),
        ({"count": 1, "kind": "tow"}, "kind must be one of 'one', 'two', got 'tow', did you mean 'two'?"),
        ({"count": 1, "pair": [1]}, r"pair must be tuple\[int, int\], got \(1,\)"),
        ({"count": 1, "pair": [1, "2"]}, r"pair must be tuple\[int, int\], got \(1, '2'\)"),
        ({"count": 1, "words": ["a", 1]}, r"words must be tuple\[str, ...\], got \('a', 1\)"),
        ({"count": 1, "words": ["a\x00"]}, "words must be "),
        ({"count": 1, "other": "x"}, "other must be "),
        ({"count": 1, "inner": {"name": "two\nlines"}}, "name must be "),
        ({"count": 1, "inner": {"share": False}}, "share must be float, got False"),
    ],
)
def test_invalid_values_are_refused(raw, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        from_dict(Outer, raw)


def test_fields_are_replaced_in_a_new_section():
    changed = replace_fields(WHOLE, {"count": 9, "other": None})
    assert (changed.count, changed.other, changed.kind) == (9, None, "two")
    assert WHOLE.count == 3 and replace_fields(WHOLE, {}) == WHOLE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cuont": 9}, "Outer has no field 'cuont', did you mean 'count'?"),
        ({"zzz": 9}, "Outer has no field 'zzz'$"),
        ({"count": "9"}, "count must be int, got '9'"),
        ({"kind": "three"}, "kind must be one of 'one', 'two', got 'three'"),
    ],
)
def test_invalid_replacements_are_refused(fields, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        replace_fields(WHOLE, fields)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none.json: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path)
