from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
from helpers.runs import ROOT

from uvit import Config, UNetConfig, UViTConfig
from uvit.common.errors import InputError
from uvit.config import (
    DataConfig,
    OptimConfig,
    ProcessConfig,
    SampleConfig,
    Section,
    TrainConfig,
    from_dict,
    load_config,
    to_json,
)

CONFIGS = sorted(ROOT.glob("configs/*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_json(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(tmp_path / "config.json") == config


def test_json_keeps_pairs_and_none():
    config = Config(model=UViTConfig(img_size=(4, 8)))
    assert from_dict(Config, json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    "section", [UViTConfig, UNetConfig, ProcessConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig]
)
def test_every_field_is_documented(section):
    """The command line's help is made of the strings under the fields."""
    source = "".join(inspect.getsource(each) for each in section.__mro__ if issubclass(each, Section))
    for field in dataclasses.fields(section):
        after = source.partition(f"    {field.name}: ")[2]
        assert after.splitlines()[1].strip().startswith('"""'), field.name


@pytest.mark.parametrize("fields", [{"compile": "graphs"}, {"mixed_precision": "fp16"}])
def test_what_cannot_be_sharded_is_refused(fields):
    [(name, value)] = fields.items()
    with pytest.raises(InputError, match=f"{name} must be another with shard True, got '{value}'"):
        TrainConfig(shard=True, **fields)


def test_cuda_graphs_do_not_accumulate():
    with pytest.raises(InputError, match="compile must be another with accumulation_steps above 1, got 'graphs'"):
        TrainConfig(compile="graphs", accumulation_steps=2)


def test_contradictory_sections_are_refused():
    with pytest.raises(InputError, match=r"label_dropout 0.1 needs model.null_class"):
        Config(train=TrainConfig(label_dropout=0.1))
    with pytest.raises(InputError, match=r"guidance 2.0 needs model.null_class"):
        Config(sample=SampleConfig(guidance=2.0)).check_guidance()
    with pytest.raises(InputError, match=r"batch_size 10 must be divisible by accumulation_steps 3"):
        TrainConfig(batch_size=10, accumulation_steps=3)
