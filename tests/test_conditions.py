from __future__ import annotations

import pytest
import torch

from uvit import Config, UViTConfig
from uvit.common.errors import InputError
from uvit.config import DataConfig, SampleConfig
from uvit.sampling.conditions import batch_conditions, class_names, condition_names, resolve_classes, resolve_conditions

LABELS = Config(model=UViTConfig(num_classes=4, null_class=True), data=DataConfig(class_names=("cat", "3", "dog", "1")))
NUMBERED = Config(model=UViTConfig(num_classes=3))
TEXT = Config(model=UViTConfig(context_dim=2, num_context_tokens=1), sample=SampleConfig(prompts=("a cat", "two dogs")))
PLAIN = Config()
CPU = torch.device("cpu")


def test_class_names_are_those_of_the_data_or_numbers():
    assert class_names(LABELS) == ("cat", "3", "dog", "1")
    assert class_names(NUMBERED) == ("0", "1", "2") and class_names(PLAIN) == ()


def test_a_class_is_a_name_before_it_is_a_number():
    assert resolve_classes(["dog", "0", 2, "3", "1"], LABELS) == [2, 0, 2, 1, 3]
    assert resolve_classes(["2", 0], NUMBERED) == [2, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [("4", "got '4'"), ("-1", "got '-1'"), ("dgo", "got 'dgo', did you mean 'dog'"), ("²", "got '²'")],
)
def test_unknown_classes_are_refused(given, message):
    with pytest.raises(InputError, match=f"class must be 0 to 3 or a class name, {message}"):
        resolve_classes([given], LABELS)


def test_default_conditions():
    assert resolve_conditions(LABELS) == [0, 1, 2, 3]
    assert resolve_conditions(TEXT) == ["a cat", "two dogs"]
    assert resolve_conditions(PLAIN) == [None]


def test_given_conditions_take_the_place_of_the_default():
    assert resolve_conditions(LABELS, classes=["dog", "cat"]) == [2, 0]
    assert resolve_conditions(TEXT, prompts=["a bird"]) == ["a bird"]


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (TEXT, {"classes": ["cat"]}, "a model with num_classes 0 takes no class, got 'cat'"),
        (LABELS, {"prompts": ["a cat"]}, "a model with context_dim 0 takes no prompt, got 'a cat'"),
        (Config(model=TEXT.model), {}, "a model with context_dim 2 draws from prompts, got none"),
    ],
)
def test_conditions_that_the_model_does_not_take_are_refused(config, asked, message):
    with pytest.raises(InputError, match=message):
        resolve_conditions(config, **asked)


def test_conditions_have_names():
    assert condition_names([2, 0], LABELS) == ["dog", "cat"]
    assert condition_names(["a bird"], TEXT) == ["a bird"] and condition_names([None], PLAIN) == []


def test_labels_become_arguments_of_the_network():
    cond, uncond = batch_conditions([2, 0], LABELS.model, None, CPU)
    assert cond["y"].tolist() == [2, 0] and uncond["y"].tolist() == [4, 4]
    cond, uncond = batch_conditions([2, 0], NUMBERED.model, None, CPU)
    assert cond["y"].tolist() == [2, 0] and uncond is None
    assert batch_conditions([None, None], PLAIN.model, None, CPU) == ({}, None)


def test_prompts_become_arguments_of_the_network():
    def encode(texts):
        return torch.tensor([[[float(len(text)), 0.0]] for text in texts])

    cond, uncond = batch_conditions(["ab", "abc"], TEXT.model, encode, CPU)
    assert cond["context"][:, 0, 0].tolist() == [2, 3] and uncond["context"][:, 0, 0].tolist() == [0, 0]
    _, uncond = batch_conditions(["ab", "abc"], TEXT.model, encode, CPU, negative="abcde")
    assert uncond["context"][:, 0, 0].tolist() == [5, 5]
    with pytest.raises(InputError, match="context_dim 2 needs a text encoder, got none"):
        batch_conditions(["ab"], TEXT.model, None, CPU)
