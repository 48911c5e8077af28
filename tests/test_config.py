from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from uvit import Config, UViTConfig
from uvit.common.errors import InputError
from uvit.config import (
    DataConfig,
    OptimConfig,
    ProcessConfig,
    SampleConfig,
    TrainConfig,
    from_dict,
    load_config,
    to_json,
)

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_json(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(tmp_path / "config.json") == config


def test_json_keeps_pairs_and_none():
    config = Config(model=UViTConfig(img_size=(4, 8)))
    assert from_dict(Config, json.loads(to_json(config))) == config


def test_every_field_is_documented():
    """The command line's help is made of the strings under the fields."""
    for section in (UViTConfig, ProcessConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig):
        source = Path(__file__).parent.parent.joinpath("uvit/config.py").read_text()
        for field in dataclasses.fields(section):
            after = source.partition(f"class {section.__name__}")[2].partition(f"    {field.name}: ")[2]
            assert after.splitlines()[1].strip().startswith('"""'), (section.__name__, field.name)


BAD_MODELS = [
    ({"depth": 3}, "depth must be even and at least 2, got 3"),
    ({"depth": 0}, "depth must be even and at least 2, got 0"),
    ({"num_heads": 5}, "embed_dim 512 must be divisible by num_heads 5"),
    ({"img_size": 33}, "img_size must be divisible by patch_size 2, got 33"),
    ({"img_size": (32, 33)}, r"img_size must be divisible by patch_size 2, got \(32, 33\)"),
    ({"img_size": 0}, "img_size must be divisible by patch_size 2, got 0"),
    ({"attention": "flash"}, "attention must be one of 'auto', 'xformers', 'sdpa', 'math', got 'flash'"),
    ({"attention": "xformer"}, "got 'xformer', did you mean 'xformers'?"),
    ({"skip": "cat"}, "skip must be one of"),
    ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
    ({"embed_dim": "512"}, "embed_dim must be int, got '512'"),
    ({"embed_dim": 511, "num_heads": 7}, "embed_dim must be even"),
    ({"qk_norm": 1}, "qk_norm must be bool, got 1"),
    ({"mlp_ratio": 0.001}, "mlp_ratio must be at least 1 / embed_dim, got 0.001"),
    ({"mlp_ratio": float("nan")}, "mlp_ratio must be float, got nan"),
    ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
    ({"null_class": True}, "null_class must be False where num_classes is 0"),
    ({"context_dim": 768}, "context_dim and num_context_tokens must both be"),
    ({"pos_embed": "sincos2d", "embed_dim": 6, "num_heads": 1}, "divisible by 4"),
    ({"patch_embed": "conv", "patch_size": 3, "img_size": 9}, "a power of 2"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_MODELS)
def test_bad_models_say_what_was_given_and_expected(fields, message):
    with pytest.raises(InputError, match=message):
        UViTConfig(**fields)


@pytest.mark.parametrize("fields", [{"compile": "graphs"}, {"mixed_precision": "fp16"}])
def test_what_cannot_be_shared_out_is_refused(fields):
    [(name, value)] = fields.items()
    with pytest.raises(InputError, match=f"{name} must be another with shard True, got '{value}'"):
        TrainConfig(shard=True, **fields)


def test_cuda_graphs_do_not_accumulate():
    with pytest.raises(InputError, match="compile must be another with accumulation_steps above 1, got 'graphs'"):
        TrainConfig(compile="graphs", accumulation_steps=2)


def test_sections_that_do_not_fit_together():
    with pytest.raises(InputError, match=r"label_dropout 0.1 needs model.null_class"):
        Config(train=TrainConfig(label_dropout=0.1))
    with pytest.raises(InputError, match=r"guidance 2.0 needs model.null_class"):
        Config(sample=SampleConfig(guidance=2.0))
    with pytest.raises(InputError, match=r"batch_size 10 must be divisible by accumulation_steps 3"):
        TrainConfig(batch_size=10, accumulation_steps=3)


def test_counts_of_tokens_and_labels():
    config = UViTConfig(num_classes=10, null_class=True, context_dim=8, num_context_tokens=77)
    assert config.num_extra_tokens == 1 + 1 + 77
    assert config.null_label == 10
    assert UViTConfig(num_classes=10).null_label is None
    assert UViTConfig(time_conditioning="adaln").num_extra_tokens == 0


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
        load_config(CONFIGS[0].parent / "digit.py")
