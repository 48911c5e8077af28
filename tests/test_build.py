from __future__ import annotations

import pytest
import torch
from helpers.golden import golden_model
from helpers.same_runs import assert_equal_weights

from uvit import Config, UViT, build_network
from uvit.common.errors import InputError
from uvit.config import to_json
from uvit.weights.build import load_network


def test_the_public_class_is_documented():
    assert "The U-ViT backbone." in UViT.__doc__ and "Example:" in UViT.__doc__
    assert UViT.__module__ == "uvit.weights.build"


def test_initial_weights_follow_the_seed(tiny):
    torch.manual_seed(3)
    first = build_network(tiny)
    torch.manual_seed(3)
    assert_equal_weights(build_network(tiny), first)
    assert first.training


@pytest.mark.parametrize("is_run", [False, True])
def test_a_network_is_loaded_from_a_run_and_from_a_folder_of_weights(tiny, tmp_path, is_run):
    model = UViT(tiny, pos_embed="sincos2d")
    model.save_pretrained(tmp_path)
    if is_run:
        (tmp_path / "config.json").write_text(to_json(Config(model=model.config)))
    loaded = load_network(tmp_path, {"attention": "math"})
    assert isinstance(loaded, UViT) and not loaded.training and loaded.config.attention == "math"
    assert_equal_weights(loaded, model)


def test_a_network_is_loaded_from_a_published_file(tmp_path):
    expected = golden_model("tiny_class")
    torch.save(expected.state_dict(), tmp_path / "nnet_ema.pth")
    loaded = load_network(tmp_path / "nnet_ema.pth", {"num_heads": 4})
    assert isinstance(loaded, UViT) and loaded.config.num_heads == 4
    assert_equal_weights(loaded, expected)
    with pytest.raises(InputError, match=r"nnet_ema.pth: num_heads must be given for embed_dim 32"):
        load_network(tmp_path / "nnet_ema.pth", {})


def test_an_unknown_field_is_refused(tiny, tmp_path):
    UViT(tiny).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="UViTConfig has no field 'atention', did you mean 'attention'"):
        load_network(tmp_path, {"atention": "math"})
