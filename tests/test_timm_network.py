"""Patches as a network of timm describes them; tests/test_features.py has its pooled features."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from uvit import Config
from uvit.config import InputError, TrainConfig
from uvit.weights.tensors import read_weights
from uvit.weights.timm_network import PatchEncoder, load_patch_encoder

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normalised(network, images, size):
    settings = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    x = interpolate((images + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)
    return (x - mean) / std


def test_a_transformer_sees_images_of_the_size_that_gives_the_grid(vit):
    encoder = PatchEncoder("test_vit", str(vit), (2, 3))
    assert encoder.size == (32, 48) and encoder.width == 64 and not encoder.network.training
    plain = timm.create_model("test_vit")
    plain.load_state_dict(read_weights(vit))
    plain.eval().set_input_size((32, 48))
    expected = plain.forward_features(normalised(plain, IMAGES, (32, 48)))[:, 1:]  # without the class token
    torch.testing.assert_close(encoder(IMAGES), expected, rtol=1e-4, atol=1e-5)
    grey = IMAGES[:, :1]
    assert torch.equal(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))
    assert not encoder(IMAGES.requires_grad_()).requires_grad


def test_a_convolutional_network_sees_its_own_size_and_is_resampled(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet").eval()
    save_file(plain.state_dict(), tmp_path / "resnet.safetensors")
    encoder = PatchEncoder("test_resnet", str(tmp_path / "resnet.safetensors"), (5, 5))
    features = plain.forward_features(normalised(plain, IMAGES, (160, 160)))  # (B, D, 5, 5)
    torch.testing.assert_close(encoder(IMAGES), features.flatten(2).mT, rtol=1e-4, atol=1e-5)
    one = PatchEncoder("test_resnet", str(tmp_path / "resnet.safetensors"), (1, 1))(IMAGES)
    assert one.shape == (2, 1, encoder.width)
    spread = encoder(IMAGES)
    assert (one[:, 0] >= spread.amin(dim=1) - 1e-4).all() and (one[:, 0] <= spread.amax(dim=1) + 1e-4).all()


def test_a_download_that_is_tried_again_does_not_say_so(monkeypatch, caplog):
    def fail(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(InputError, match="timm model 'test_vit' cannot be loaded: no network"):
        PatchEncoder("test_vit", None, (2, 2))
    assert not caplog.records


def test_what_is_refused(vit, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="timm model 'no_such' cannot be loaded: "):
        PatchEncoder("no_such", None, (2, 2))
    with pytest.raises(InputError, match="timm model 'test_vit' cannot be loaded: "):
        PatchEncoder("test_vit", None, (2, 2))
    with pytest.raises(InputError, match="no weights at nowhere"):
        PatchEncoder("test_vit", "nowhere", (2, 2))
    monkeypatch.setattr(timm.models.VisionTransformer, "set_input_size", lambda *_, **__: 1 / 0)
    with pytest.raises(
        InputError, match="'test_vit' gives no features of the patches of 32x32 images: division by zero"
    ):
        PatchEncoder("test_vit", str(vit), (2, 2))


def test_an_encoder_is_loaded_only_where_it_is_used(vit):
    fields = dict(alignment="repa", alignment_encoder="timm:test_vit", alignment_encoder_weights=str(vit))
    assert load_patch_encoder(Config()) is None
    assert load_patch_encoder(Config(train=TrainConfig(alignment="layersync"))) is None
    assert load_patch_encoder(Config(train=TrainConfig(**fields, alignment_weight=0.0))) is None
    assert load_patch_encoder(Config(train=TrainConfig(**fields))).grid == (16, 16)
