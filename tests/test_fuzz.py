"""Whatever a config or a command line holds: it is taken, or refused by an InputError, and nothing else is raised."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from helpers.runs import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import uvit.__main__
from uvit.commands import app, card, convert, encode, evaluate, export, push, sample, train
from uvit.common.cli import parse
from uvit.common.errors import InputError
from uvit.config import Config, ProcessConfig, SampleConfig, Section, UViTConfig, from_dict, load_config, to_json
from uvit.data.manifest import Manifest
from uvit.diffusion.samplers import sampling_times
from uvit.evaluation.measure import MeasureArguments

FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DIGITS = ROOT / "configs" / "digits.py"
ODD_NUMBERS = [0, -1, 1, 2, 3, 10**6, 10**9, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324, True, False]
ODD_TEXTS = ["", " ", "auto", "none", "nan", "\x00", "\x1b[31m", "\ud800", "../..", "a\nb", "n" * 300, "tru", "1e3"]
odd = st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS, None, [], {}, [1, 2], [[1], [2]], [0.5, "x"], float("nan")])
leaves = odd | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
# The name of each section in a config, and a class that it can have.
sections = [(name, cls) for name, hint in get_type_hints(Config).items() for cls in get_args(hint) or (hint,)]


def refused_or_taken(function, *arguments):
    """Returns what the function does, or None where it refuses."""
    try:
        return function(*arguments)
    except InputError as error:
        assert str(error).strip()
        return None


def fields_of(cls: type[Section]) -> st.SearchStrategy[dict]:
    """Some of a section's fields, with any values at all, odd ones, or some of their own type."""
    hints, names = get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
    return st.fixed_dictionaries({}, optional={name: values | of_type(hints[name]) for name in names})


def of_type(hint) -> st.SearchStrategy:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(of_type, args))
    if origin is tuple:
        return st.lists(of_type(args[0]), max_size=3) if args[-1] is ... else st.tuples(*map(of_type, args)).map(list)
    if hint is type(None):
        return st.none()
    if isinstance(hint, type) and issubclass(hint, Section):
        return fields_of(hint)
    small = {int: st.integers(-1, 64), float: st.floats(-1, 2), bool: st.booleans(), str: st.text(max_size=8)}
    return small[hint]


@FUZZ
@given(values)
def test_any_json_is_a_config_or_refused(raw):
    refused_or_taken(from_dict, Config, raw)


@pytest.mark.parametrize("cls", [*(cls for _, cls in sections), Manifest])
def test_any_fields_make_a_section_or_are_refused(cls):
    start = {"source": "x", "num_images": 4, "shard_size": 2, "image_shape": [8, 8], "latent_shape": [1, 4, 4]}
    start |= {"autoencoder": "a", "encoder_hash": "b", "scale_factor": 1.0}

    @FUZZ
    @given(fields_of(cls))
    def check(fields):
        made = refused_or_taken(from_dict, cls, {**(start if cls is Manifest else {}), **fields})
        if made is not None:
            assert from_dict(cls, json.loads(to_json(made))) == made
        if isinstance(made, UViTConfig):
            assert made.num_tokens > 0 and made.most_parameters <= 1e11
        if isinstance(made, Manifest):
            assert made.num_shards >= 1

    check()


@FUZZ
@given(st.data())
def test_any_change_of_a_whole_config_file(tmp_path, data):
    """One value of a valid config.json is replaced, or the text is cut, doubled or overwritten."""
    raw = json.loads(to_json(load_config(DIGITS)))
    section = raw[data.draw(st.sampled_from(sorted(raw)))]
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(values)
    text = json.dumps(raw)
    start, end = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
    how = data.draw(st.sampled_from(["", "cut", "doubled", "overwritten"]))
    text = {"cut": text[:start], "doubled": text[:end] + text[start:]}.get(how, text)
    if how == "overwritten":
        text = text[:start] + data.draw(st.text(max_size=5)) + text[start + 1 :]
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    refused_or_taken(load_config, tmp_path / "config.json")


@FUZZ
@given(st.sampled_from(sections), st.data())
def test_any_config_in_python(tmp_path, section, data):
    name, cls = section
    fields = data.draw(fields_of(cls))
    literals = ", ".join(f"{field}={value!r}" for field, value in fields.items())
    text = f"from uvit.config import *\nconfig = Config({name}={cls.__name__}({literals}))\n"
    (tmp_path / "config.py").write_bytes(text.encode(errors="backslashreplace"))
    refused_or_taken(load_config, tmp_path / "config.py")


def test_a_number_too_long_to_print():
    with pytest.raises(
        InputError, match="seed must be below 9223372036854775808 in size, got an integer of 16610 bits"
    ):
        from_dict(Config, {"train": {"seed": 10**5000}})


@FUZZ
@given(of_type(ProcessConfig), of_type(SampleConfig))
def test_any_grid_of_times(process, sampling):
    made = refused_or_taken(from_dict, ProcessConfig, process), refused_or_taken(from_dict, SampleConfig, sampling)
    if None not in made and made[1].num_steps <= 100:
        times = refused_or_taken(sampling_times, *made)
        assert times is None or (len(times) > 1 and all(1 >= t > s >= 0 for t, s in zip(times, times[1:])))


def option_names(cls, prefix="--"):
    for name, hint in get_type_hints(cls).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Section)]
        if kinds:
            yield from (option for kind in kinds for option in option_names(kind, f"{prefix}{name}."))
        else:
            yield prefix + name


def parser_of(cls):
    """A command's parser, and its options."""
    return lambda words: parse(cls, words), list(option_names(cls))


PARSERS = {
    "train": (lambda words: train.read_arguments([str(DIGITS), *words]), list(option_names(Config))),
    "sample": parser_of(sample.Arguments),
    "evaluate": parser_of(MeasureArguments),
    "stats": parser_of(evaluate.StatisticsArguments),
    "encode": parser_of(encode.Arguments),
    "app": parser_of(app.Arguments),
    "export": parser_of(export.Arguments),
    "push": parser_of(push.Arguments),
    "card": parser_of(card.Arguments),
    "convert": (convert.main, [*option_names(convert.Arguments), "nowhere/at/all"]),
    "uvit": (uvit.__main__.main, ["convert", "trian", "nowhere/at/all"]),
}


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.usefixtures("offline")
def test_any_command_line(name, tmp_path, monkeypatch):
    read, options = PARSERS[name]
    monkeypatch.chdir(tmp_path)
    words = st.sampled_from([*map(str, ODD_NUMBERS), *ODD_TEXTS, "-", "--", "=", "{}", "None"]) | st.text(max_size=4)
    pair = st.tuples(st.sampled_from(options), words).map(list)
    line = st.lists(pair | words.map(lambda word: [word]), max_size=5)

    @settings(FUZZ, max_examples=30)
    @given(line.map(lambda parts: [word for part in parts for word in part if word not in ("-h", "--help")]))
    def check(arguments):
        refused_or_taken(read, arguments)

    check()
    assert list(tmp_path.iterdir()) == []
