from __future__ import annotations

from importlib.metadata import version

import torch

import uvit
from uvit import Config, UViT, UViTConfig
from uvit.config import SampleConfig
from uvit.evaluation.features import build_features
from uvit.evaluation.protocol import describe_drawing, describe_features, versions
from uvit.networks.encoders import NO_ENCODERS
from uvit.weights.tensors import hash_weights

MODEL = UViTConfig(img_size=8, in_chans=1, embed_dim=8, depth=2, num_heads=1, num_classes=3, null_class=True)


def drawing_of(config, conditions, mode="balanced", checkpoint="runs/x"):
    torch.manual_seed(0)
    network = UViT(MODEL)
    named = {"model": network, "config": config, "encoders": NO_ENCODERS}
    return network, describe_drawing(checkpoint, **named, conditions=conditions, label_mode=mode, seed=4)


def test_a_drawing_is_described(tmp_path):
    sampling = SampleConfig(num_steps=5, guidance=1.5, guidance_interval=(0.1, 0.9), reuse="1:3")
    for step in (20, 100):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    network, said = drawing_of(Config(model=MODEL, sample=sampling), [0, 0, 1, 1, 2, 2], checkpoint=str(tmp_path))
    assert said == {
        "images": "6 drawn, 2 a class",
        "weights": f"EMA of {tmp_path}, step_00000100, hash {hash_weights(network.state_dict())}",
        "guidance": "w = 1.5 (the paper's s = 0.5)",
        "guidance_interval": "0.1 to 0.9",
        "sampler": "dpmpp_2m, 5 steps (uniform from t = 1 to 0)",
        "precision": "no",
        "reuse": "1:3",
        "seed": "4",
        "text_encoder": "none",
        "decoder": "none",
        "rounding": "uint8",
    }


def test_the_number_of_images_is_described():
    labels = Config(model=MODEL)
    assert drawing_of(labels, [0, 2, 2], "random")[1]["images"] == "3 drawn, labels at random"
    text = Config(model=UViTConfig(context_dim=2, num_context_tokens=1))
    expected = "3 drawn, 2 different captions of the reference, balanced"
    assert drawing_of(text, ["a", "b", "a"])[1]["images"] == expected
    assert drawing_of(Config(), [None] * 3)[1]["images"] == "3 drawn"


def test_features_and_versions_are_described(vit):
    assert describe_features("pixels", build_features("pixels", None, (1, 8, 8))) == "pixels"
    network = build_features("timm:test_vit", str(vit), (3, 8, 8))
    assert describe_features("timm:test_vit", network) == f"timm:test_vit, hash {network.weights_hash}"
    assert versions().startswith(f"uvit {uvit.__version__}, torch {version('torch')}, timm ")
