"""A base class for config dataclasses: values are checked on construction, and saved as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from uvit.common.errors import UNPRINTABLE, InputError, did_you_mean, short_repr
from uvit.common.files import write_text

INT_LIMIT = 2**63
MAX_JSON_BYTES = 2**26
SEAL = "uvit_hash"
"""The key of a hash of the other fields in a JSON file that this package writes."""

NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")
"""Characters that no file system, tokenizer or font accepts."""


def _plain(value: Any) -> Any:
    """Returns numbers of numpy as Python's, which JSON holds; also those in a tuple."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Real) and hasattr(value, "item") else value


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether `value` is of the annotated type; an int counts as a float, a bool not as a number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args and isinstance(value, str)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_fits(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_fits, value, args))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _choices(hint: Any) -> list[str]:
    """Returns the string values that a type allows."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for arg in get_args(hint) for word in _choices(arg)]


def _expected(hint: Any) -> str:
    """Describes a type in an error: `one of 'a', 'b'` or `int`."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


def _hints(cls: type[Section]) -> dict[str, Any]:
    """Returns the types of a section's fields, by name."""
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in dataclasses.fields(cls)}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a config, whose fields are checked against their annotations on construction.

    Raises:
        InputError: a field of the wrong type, or with an invalid value.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = _plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if not _fits(value, hint):
                near = did_you_mean(value, _choices(hint)) if isinstance(value, str) else ""
                raise InputError(f"{name} must be {_expected(hint)}, got {short_repr(value)}{near}")
            # A string may be printed or become a path; those in tuples (captions, class names) come from data as is.
            self._require(name, not isinstance(value, str) or not UNPRINTABLE.search(value), "plain text in one line")
            for item in value if isinstance(value, tuple) else (value,):
                self._require(
                    name,
                    not isinstance(item, str) or not NO_TEXT.search(item),
                    "text without null characters or lone surrogates",
                )
                self._require(name, not isinstance(item, int) or abs(item) < INT_LIMIT, f"below {INT_LIMIT} in size")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, got {short_repr(getattr(self, name))}")

    def _require_at_most(self, **limits: int) -> None:
        for name, limit in limits.items():
            self._require(name, getattr(self, name) <= limit, f"at most {limit:,}")


SectionT = TypeVar("SectionT", bound=Section)


def _sections(hint: Any) -> list[type[Section]]:
    """Returns the sections that a type allows: itself, the members of a union, or none."""
    return [each for each in get_args(hint) or (hint,) if isinstance(each, type) and issubclass(each, Section)]


def _choose(sections: Sequence[type[Section]], raw: Mapping[str, Any]) -> type[Section]:
    """Returns the section that a JSON object is of: those of a union say so in their first field, by default the first.

    Raises:
        InputError: none of them.
    """
    if len(sections) == 1:
        return sections[0]
    named = {str(dataclasses.fields(each)[0].default): each for each in sections}
    tag = dataclasses.fields(sections[0])[0].name
    given = raw.get(tag, next(iter(named)))
    if not isinstance(given, str) or given not in named:
        near = did_you_mean(given, named) if isinstance(given, str) else ""
        raise InputError(f"{tag} must be one of {', '.join(map(repr, named))}, got {short_repr(given)}{near}")
    return named[given]


def from_dict(cls: type[SectionT] | types.UnionType, raw: Any, source: Path | None = None) -> SectionT:
    """Builds a section from JSON: nested sections are dicts, tuples are lists.

    Args:
        cls: the section, or a union of sections that each name themselves in their first field.
        raw: what JSON holds.
        source: the file that held it, which errors name.

    Raises:
        InputError: not a dict, an unknown or missing field, or an invalid value.
    """
    try:
        return _build(cls, raw)
    except InputError as error:
        raise InputError(f"{source}: {error}" if source else str(error)) from None


def _build(cls: type[SectionT] | types.UnionType, raw: Any) -> SectionT:
    sections = _sections(cls)
    if not isinstance(raw, dict):
        names = " or ".join(each.__name__ for each in sections)
        raise InputError(f"{names} must be a JSON object, got {short_repr(raw)}")
    chosen: Any = _choose(sections, raw)
    hints = _hints(chosen)
    for each in dataclasses.fields(chosen):
        if each.name not in raw and each.default is each.default_factory is dataclasses.MISSING:
            raise InputError(f"{chosen.__name__} must have a field {each.name!r}, got {', '.join(raw) or 'none'}")
    values = {}
    for name, value in raw.items():
        if name not in hints:
            raise InputError(f"{chosen.__name__} has no field {short_repr(name)}{did_you_mean(name, hints)}")
        if _sections(hints[name]):
            value = _build(hints[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return chosen(**values)


def check_fields(cls: type[Section], names: Iterable[str]) -> None:
    """Checks that a section has fields of these names.

    Raises:
        InputError: it has not.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for name in names:
        if name not in known:
            raise InputError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}")


def replace_fields(section: SectionT, fields: Mapping[str, Any]) -> SectionT:
    """Returns the section with some fields replaced.

    Raises:
        InputError: an unknown field, or a value that the section refuses.
    """
    check_fields(type(section), fields)
    return dataclasses.replace(section, **fields)


def to_json(section: Section, sealed: bool = False) -> str:
    """Returns the section as JSON, defaults included.

    Args:
        section: what to write.
        sealed: whether to add a hash, by which `read_json` notices changes.
    """
    fields = dataclasses.asdict(section)
    return json.dumps({**fields, SEAL: _seal(fields)} if sealed else fields, indent=2) + "\n"


def save_json(path: Path, section: Section) -> None:
    """Writes a section as JSON with a hash of it, atomically.

    Raises:
        InputError: it cannot be written.
    """
    write_text(path, to_json(section, sealed=True))


def _seal(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Reads a JSON file, without its hash if it has one.

    Raises:
        InputError: no such file, a file larger than MAX_JSON_BYTES, invalid JSON, or a hash of something else.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(text) > MAX_JSON_BYTES:
        raise InputError(f"{path} must have at most {MAX_JSON_BYTES:,} bytes, got more")
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if isinstance(content, dict) and SEAL in content:
        expected, found = content.pop(SEAL), _seal(content)
        if found != expected:
            change = (
                f"{path} was changed since it was written, its {SEAL} must be {found!r}, got {short_repr(expected)}"
            )
            raise InputError(f"{change}: restore it, or remove the {SEAL} to accept the change")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short_repr(name)} appears twice")
    return fields


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")
