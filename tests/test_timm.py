"""The published models in timm's registry."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys

import pytest
import timm
import torch

import uvit.integrations.timm  # noqa: F401
from uvit import UViT
from uvit.common.errors import InputError
from uvit.weights.published import PUBLISHED_UVIT

NAMES = {
    "uvit_small_patch2_32": ["cifar10", "mscoco"],
    "uvit_small_patch4_64": ["celeba64"],
    "uvit_mid_patch4_64": ["imagenet64"],
    "uvit_large_patch4_64": ["imagenet64", "imagenet512"],
    "uvit_large_patch2_32": ["imagenet256"],
    "uvit_huge_patch2_32": ["imagenet256"],
    "uvit_huge_patch4_64": ["imagenet512"],
    "uvit_small_deep_patch2_32": ["mscoco"],
}
TAGGED = [f"{name}.{tag}" for name, tags in NAMES.items() for tag in tags]
SMALL = "uvit_small_patch2_32"


def create(name, **fields):
    with torch.device("meta"):
        return timm.create_model(name, **fields)


def test_every_published_model_is_listed():
    assert timm.list_models("uvit*") == sorted(NAMES)
    assert sorted(timm.list_models("uvit*", include_tags=True)) == sorted(TAGGED)
    assert timm.list_pretrained("uvit*") == []


def test_names_are_registered_by_one_import_alone():
    code = "import timm, uvit; print(timm.list_models('uvit*')); import uvit.integrations.timm"
    code += "; print(len(timm.list_models('uvit*')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", str(len(NAMES))] and done.stderr == ""


def test_tags_are_the_published_models():
    built = [create(name).config for name in TAGGED]
    assert sorted(map(str, built)) == sorted(map(str, PUBLISHED_UVIT.values()))
    for name, tags in NAMES.items():
        assert create(name).config == create(f"{name}.{tags[0]}").config


@pytest.mark.parametrize("name", TAGGED)
def test_pretrained_cfg_has_the_input_and_no_address(name):
    model = create(name)
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["tag"]) == tuple(name.split("."))
    assert cfg["input_size"] == (model.config.in_chans, *model.config.image_shape)
    assert len(cfg["mean"]) == len(cfg["std"]) == model.config.in_chans
    assert cfg["num_classes"] == model.config.num_classes
    assert not cfg["url"] and "hf_hub_id" not in cfg
    assert model.get_submodule(cfg["first_conv"]).in_channels == model.config.in_chans
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        create(name, pretrained=True)


def test_fields_of_the_config_go_through():
    model = create("uvit_huge_patch2_32", img_size=64, in_chans=3, num_classes=10, qk_norm=True)
    assert (model.config.img_size, model.config.in_chans, model.config.null_label) == (64, 3, 10)
    assert model.config.qk_norm and model.config.depth == 28
    assert create("uvit_huge_patch2_32", num_classes=0).config.null_label is None
    with pytest.raises(InputError, match="UViTConfig has no field 'drop_path_rate'"):
        create(SMALL, drop_path_rate=0.1)
    with pytest.raises(InputError, match="the tag of uvit_small_patch2_32 must be one of cifar10, mscoco, got 'in1k'"):
        create(f"{SMALL}.in1k")


@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_published_files_load_strictly_into_timms_models(way, tmp_path):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    expected = UViT(PUBLISHED_UVIT["cifar10_uvit_small"], **sizes).state_dict()
    path = tmp_path / "nnet_ema.pth"
    torch.save(expected, path)
    given = {"checkpoint_path": path} if way == "checkpoint_path" else {"pretrained": True, way: {"file": str(path)}}
    loaded = timm.create_model(SMALL, **sizes, **given).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    with pytest.raises(RuntimeError, match=r"Missing key.*out_blocks.1"):
        timm.create_model(SMALL, **{**sizes, "depth": 4}, **given)


def test_features_only_gives_the_chosen_blocks():
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4}
    torch.manual_seed(0)
    features = timm.create_model(SMALL, **sizes, features_only=True, out_indices=(0, 2, 4))
    assert features.feature_info.module_name() == ["in_blocks.0", "mid_block", "out_blocks.1"]
    assert features.feature_info.channels() == [32] * 3 and features.feature_info.reduction() == [2] * 3
    x = torch.randn(2, 3, 32, 32)
    found = features(x)
    assert [tuple(each.shape) for each in found] == [(2, 32, 16, 16)] * 3
    expected = features.model.forward_intermediates(x, indices=[0, 2, 4], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
    named = dict(features.model.named_modules())
    assert all(name in named for name in features.feature_info.module_name())
    assert timm.create_model(SMALL, **sizes, features_only=True).feature_info.out_indices == (2, 3, 4)


def test_features_come_in_the_order_asked_for():
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4}
    torch.manual_seed(0)
    features = timm.create_model(SMALL, **sizes, features_only=True, out_indices=(3, 0, -2, 1))
    assert features.feature_info.module_name() == ["out_blocks.0", "in_blocks.0", "out_blocks.0", "in_blocks.1"]
    x = torch.randn(2, 3, 32, 32)
    found = features(x)
    each = [features.model.forward_intermediates(x, [n], intermediates_only=True)[0] for n in (3, 0, 3, 1)]
    assert len(found) == 4 and all(torch.equal(ours, theirs) for ours, theirs in zip(found, each))


@pytest.mark.parametrize("block", [0, 2, 3])
def test_features_only_keeps_no_deep_blocks_that_it_does_not_need(block):
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4}
    torch.manual_seed(0)
    whole = timm.create_model(SMALL, **sizes)
    torch.manual_seed(0)
    features = timm.create_model(SMALL, **sizes, features_only=True, out_indices=(block - 5,))
    left = {name.partition(".")[2] for name, _ in features.named_parameters()}
    kept = {name.split(".")[1] for name in left if name.startswith("out_blocks")}
    assert kept == ({"0"} if block == 3 else set())
    assert not any(name.startswith(("norm", "decoder_pred", "final_layer")) for name in left)
    x = torch.randn(2, 3, 32, 32)
    (found,) = features(x)
    assert torch.equal(found, whole.forward_intermediates(x, [block], intermediates_only=True)[0])
    found.mean().backward()
    if block >= 2:
        assert all(parameter.grad is not None for parameter in features.parameters())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("uvit_mid_patch4_64", {}, "got context_dim 0, num_classes 1000: use forward_intermediates"),
        ("uvit_small_deep_patch2_32", {}, "got context_dim 768, num_classes 0: use forward_intermediates"),
        (SMALL, {"num_classes": 10}, "got context_dim 0, num_classes 10: use forward_intermediates"),
        ("uvit_mid_patch4_64", {"num_classes": 0}, None),
        ("uvit_mid_patch4_64", {"null_class": True}, None),
    ],
)
def test_features_of_images_alone_need_a_model_that_takes_no_more(name, fields, message):
    refused = contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message)
    with refused:
        create(name, **fields, features_only=True)


def test_intermediates_are_returned_as_timms_vit_returns_them():
    """One call for both, whatever form is asked for: the same types, keys and shapes."""
    vit = timm.create_model("test_vit", img_size=32, patch_size=2, embed_dim=64, depth=5, num_heads=2).eval()
    ours = timm.create_model(SMALL, embed_dim=64, depth=4, num_heads=2).eval()

    def shapes(value):
        if isinstance(value, dict):
            return {key: shapes(each) for key, each in value.items()}
        return tuple(value.shape) if torch.is_tensor(value) else [type(value), *map(shapes, value)]

    x = torch.randn(2, 3, 32, 32)
    for chosen in itertools.product((False, True), repeat=4):
        flags = dict(zip(("return_prefix_tokens", "stop_early", "intermediates_only", "output_dict"), chosen))
        for output_fmt in ("NCHW", "NLC"):
            given = [model.forward_intermediates(x, [1, 2], output_fmt=output_fmt, **flags) for model in (ours, vit)]
            assert shapes(given[0]) == shapes(given[1])
