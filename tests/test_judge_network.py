from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.idx import save_idx

from uvit.commands import evaluate
from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.embedded import Digits
from uvit.evaluation.features import build_features
from uvit.evaluation.judge import build_classifier
from uvit.evaluation.judge_network import Judge, Recipe, load_judge, train_judge
from uvit.weights.tensors import hash_weights, write_weights

SHORT = Recipe(layers=((16, 3, 2), (32, 3, 2)), num_steps=60, batch_size=64)
DIGITS = Digits.load(train=True)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where judges are kept, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub/uvit_judges"


def test_a_judge_learns_to_tell_digits_apart():
    judge = train_judge(DIGITS.images, DIGITS.labels, 10, SHORT)
    held_out = read_all(Digits.load(train=False))
    features, logits = judge(held_out.images)
    assert features.shape == (360, 32) and logits.shape == (360, 10)
    assert (logits.argmax(dim=1) == held_out.labels).float().mean() > 0.9
    torch.testing.assert_close(judge.head(features), logits)
    assert torch.equal(judge(held_out.images[:7])[0], features[:7])  # each image by itself


def test_the_same_data_and_recipe_give_the_same_judge():
    few = dataclasses.replace(SHORT, num_steps=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = train_judge(DIGITS.images, DIGITS.labels, 10, few)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = (
        train_judge(DIGITS.images, DIGITS.labels, 10, recipe) for recipe in (few, dataclasses.replace(few, seed=1))
    )
    assert hash_weights(one.state_dict()) == hash_weights(two.state_dict()) != hash_weights(other.state_dict())


def test_the_judge_is_small():
    sizes = {shape: sum(p.numel() for p in Judge(shape[0], 10).parameters()) for shape in ((1, 28, 28), (3, 32, 32))}
    assert all(50_000 < size < 500_000 for size in sizes.values())
    for channels, *size in sizes:
        assert Judge(channels, 10)(torch.zeros(2, channels, *size, dtype=torch.uint8))[1].shape == (2, 10)


def test_a_judge_is_trained_once(cache, capsys):
    few = dataclasses.replace(SHORT, num_steps=2)
    first = load_judge(DIGITS, recipe=few)
    (file,) = cache.glob("*/model.safetensors")
    assert "training the judge" in capsys.readouterr().err
    again = load_judge(DIGITS, recipe=few)
    assert hash_weights(first.state_dict()) == hash_weights(again.state_dict())
    assert "training" not in capsys.readouterr().err
    given = load_judge(Digits.load(train=False), file, few)  # weights that are given are those
    assert hash_weights(given.state_dict()) == hash_weights(first.state_dict())
    load_judge(Digits.load(train=False), recipe=few)
    load_judge(DIGITS, recipe=dataclasses.replace(few, num_steps=3))
    assert len([*cache.iterdir()]) == 3  # other data, another recipe: another judge


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write to .*file is not a folder"):
        load_judge(DIGITS, recipe=dataclasses.replace(SHORT, num_steps=2))


def test_a_judge_of_other_classes_or_no_labels_is_refused(tmp_path):
    write_weights(tmp_path, Judge(1, 9).state_dict())
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="must hold a judge of 10 classes and 1 channels, got other tensors"):
        build_features("judge", file, DIGITS.shape, DIGITS)
    with pytest.raises(
        InputError, match="'judge' needs the labelled images of a run's own data to learn from, got none"
    ):
        build_features("judge", file, DIGITS.shape)
    save_idx(tmp_path / "data")
    unlabelled = load_images(DataConfig(name=str(tmp_path / "data")), ImageSpec(None, labels=False, captions=None))
    with pytest.raises(InputError, match="'judge' needs the labelled images"):
        build_classifier("judge", None, unlabelled, torch.device("cpu"))


def test_evaluate_asks_a_judge(workdir, tmp_path):
    judge = Judge(1, 10)
    write_weights(tmp_path, judge.state_dict())
    weights = f"{tmp_path}/model.safetensors"
    options = f"--features judge --feature_weights {weights} --classifier judge --classifier_weights {weights}"
    arguments = f"--checkpoint runs/tiny --num_images 20 --steps 1 --output {tmp_path}/figures.json {options}"
    evaluate.main(arguments.split())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"recognised", "recognised_real", "frechet", "frechet_real", "protocol"}
    assert figures["frechet"] > figures["frechet_real"] > 0
    assert figures["protocol"]["classifier"] == f"judge, weights {build_hash(weights)}"
    assert figures["protocol"]["features"] == f"judge, hash {build_hash(weights)}"


def build_hash(weights: str) -> str | None:
    return build_features("judge", weights, DIGITS.shape, DIGITS).weights_hash
