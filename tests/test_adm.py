"""Files of ADM: what their tensors tell, and what they are refused for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.golden import golden_model, golden_unet, golden_unet_inputs

from uvit import Config, UNet, UNetConfig, UViT
from uvit.commands import convert, sample, train
from uvit.common.errors import InputError
from uvit.config import SampleConfig, to_json
from uvit.weights.adm import DDPM_NOISE, PUBLISHED_ADM, infer_unet_config


@pytest.mark.parametrize("name", PUBLISHED_ADM)
def test_the_tensors_of_a_published_model_tell_its_config(name):
    with torch.device("meta"):
        weights = UNet(PUBLISHED_ADM[name]).state_dict()
    assert infer_unet_config(weights) == PUBLISHED_ADM[name]


@pytest.mark.parametrize(
    "fields",
    [
        {"skips": False},
        {"resblock_updown": False, "scale_shift_norm": False},
        {"channel_mult": (1,), "num_res_blocks": 3},
        {"context_dim": 12, "num_context_tokens": 7, "num_classes": 4, "null_class": True},
    ],
)
def test_the_tensors_of_others_tell_all_but_a_few_fields(fields):
    sizes = {"img_size": 16, "model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1}
    config = UNetConfig(**{**sizes, "attention_sizes": (16,), "head_dim": 16, **fields})
    known = {name: getattr(config, name) for name in ("img_size", "head_dim", "null_class", "num_context_tokens")}
    found = infer_unet_config(UNet(config).state_dict(), **known)
    assert dataclasses.replace(found, num_heads=config.num_heads, out_chans=config.out_chans) == config


def test_sizes_that_are_not_published_must_be_given():
    weights = golden_unet("adm_class").state_dict()
    with pytest.raises(InputError, match="img_size must be given for widths 32, 64, 64, which are not published"):
        infer_unet_config(weights)
    with pytest.raises(InputError, match="num_heads or head_dim must be given"):
        infer_unet_config(weights, img_size=16)
    assert infer_unet_config(weights, img_size=16, num_heads=4).head_dim == 0


@pytest.fixture
def adm_file(tmp_path):
    model = golden_unet("adm_class")
    torch.save(model.state_dict(), tmp_path / "16x16_diffusion.pt")
    return tmp_path / "16x16_diffusion.pt", model


def test_a_file_loads_unchanged(adm_file):
    path, model = adm_file
    loaded = UNet.from_pretrained(path, img_size=16, head_dim=16)
    inputs = golden_unet_inputs(model.config)
    assert torch.equal(loaded(**inputs), model.eval()(**inputs))


def test_a_file_of_other_sizes_is_converted(adm_file, tmp_path):
    path, model = adm_file
    convert.main(
        [str(path), str(tmp_path / "converted"), "--img_size", "16", "16", "--head_dim", "16", "--qkv_order", "new"]
    )
    converted = UNet.from_pretrained(tmp_path / "converted")
    assert (converted.config.head_dim, converted.config.qkv_order) == (16, "new")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in converted.state_dict().items())


def test_a_file_draws_with_its_config(adm_file, tmp_path, monkeypatch):
    path, model = adm_file
    monkeypatch.chdir(tmp_path)
    config = Config(model=model.config, process=DDPM_NOISE, sample=SampleConfig(num_steps=2))
    (tmp_path / "adm.json").write_text(to_json(config))
    sample.main(["--config", "adm.json", "--checkpoint", str(path), "--num_per_class", "1", "--output", "grid.png"])
    assert (tmp_path / "grid.png").stat().st_size > 1000
    with pytest.raises(InputError, match=r"model.out_chans must be None or in_chans 3 to train, got 6"):
        train.main(["adm.json"])


def test_each_kind_of_file_is_refused_for_the_other_network(adm_file, tmp_path):
    path, _ = adm_file
    with pytest.raises(InputError, match="has the weights of a U-Net, expected those of a U-ViT"):
        UViT.from_pretrained(path)
    torch.save(golden_model("tiny_class").state_dict(), tmp_path / "uvit.pth")
    with pytest.raises(InputError, match="has the weights of a U-ViT, expected those of a U-Net"):
        UNet.from_pretrained(tmp_path / "uvit.pth")
    (tmp_path / "uvit.json").write_text(to_json(Config()))
    with pytest.raises(InputError, match="has the weights of a U-Net, expected those of a U-ViT"):
        sample.main(["--config", str(tmp_path / "uvit.json"), "--checkpoint", str(path)])


def test_other_tensors_are_refused():
    weights = golden_unet("adm_class").state_dict()
    weights["time_embed.0.weight"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"time_embed.0.weight must have 2 dimensions"):
        infer_unet_config(weights)
    del weights["time_embed.0.weight"]
    with pytest.raises(InputError, match=r"there is no tensor 'time_embed.0.weight'"):
        infer_unet_config(weights)
