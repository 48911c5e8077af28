from __future__ import annotations

import sys

import pytest
import timm
import torch
from helpers.malicious import PICKLE, WORDS

from uvit.common.errors import InputError
from uvit.evaluation.features import InceptionFeatures, TimmFeatures, build_features

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels():
    network = build_features("pixels", None, (3, 16, 16))
    features, logits = network(IMAGES)
    assert network.num_features == 768 and logits is None
    torch.testing.assert_close(features, IMAGES.flatten(1) / 127.5 - 1)


def test_inception_from_a_file(inception):
    network = build_features("inception", str(inception), (3, 16, 16))
    features, logits = network(IMAGES)
    assert features.shape == (3, network.num_features) == (3, 2048)
    assert logits.shape == (3, network.num_classes) == (3, 1008)
    grey = IMAGES[:, :1]
    assert torch.equal(network(grey)[0], network(grey.expand(-1, 3, -1, -1))[0])


def test_missing_and_invalid_inception_weights(inception, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="no weights at nowhere"):
        InceptionFeatures("nowhere")
    (tmp_path / "bad.pth").write_bytes(PICKLE)
    with pytest.raises(InputError, match=r"bad.pth is not a valid weights-only file"):
        InceptionFeatures(str(tmp_path / "bad.pth"))
    assert WORDS not in capsys.readouterr().out
    torch.save({"conv": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"Inception's weights in .*other.pth: .*Missing key"):
        InceptionFeatures(str(tmp_path / "other.pth"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match=r"cannot be downloaded; give a file with --feature_weights: .*no network"):
        InceptionFeatures(None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="needs the package torch-fidelity, which is not installed"):
        InceptionFeatures(None)


def test_timm_features_and_classes(vit):
    network = build_features("timm:test_vit", str(vit), (3, 16, 16))
    features, logits = network(IMAGES)
    assert features.shape == (3, network.num_features) and logits is None
    classifier = TimmFeatures("test_vit", str(vit), classify=True)
    assert classifier(IMAGES)[0].shape == (3, 1000)
    whole = timm.create_model("test_vit")
    whole.load_state_dict(classifier.network.state_dict())
    settings = timm.data.resolve_model_data_config(whole)
    assert classifier.size == tuple(settings["input_size"][1:])
    white = torch.full((1, 3, *classifier.size), 255, dtype=torch.uint8)
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    expected = whole.eval()((white / 255 - mean) / std)
    torch.testing.assert_close(classifier(white)[0], expected, rtol=1e-4, atol=1e-5)


def test_missing_and_invalid_timm_networks(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="timm model 'no_such' cannot be loaded: "):
        build_features("timm:no_such", None, (3, 16, 16))
    with pytest.raises(InputError, match="timm model 'test_vit' cannot be loaded: "):
        build_features("timm:test_vit", None, (3, 16, 16))
    with pytest.raises(InputError, match="no weights at nowhere"):
        build_features("timm:test_vit", "nowhere", (3, 16, 16))
    with pytest.raises(InputError, match=r"timm model 'test_resnet' cannot be loaded from .*vit.safetensors: "):
        build_features("timm:test_resnet", str(vit), (3, 16, 16))
    with pytest.raises(InputError, match="features must be 'pixels', 'judge', 'inception' or 'timm:MODEL', got 'dino'"):
        build_features("dino", None, (3, 16, 16))
