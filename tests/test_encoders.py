from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from helpers.encoders import make_autoencoder, make_text_encoder
from helpers.malicious import PICKLE, WORDS
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionConfig

from uvit.common.errors import InputError
from uvit.config import DataConfig, UViTConfig
from uvit.networks.encoders import CACHED_CAPTIONS, NO_ENCODERS, Autoencoder, TextEncoder, load_encoders, sample_latents


def test_latents_are_drawn_from_their_moments():
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 2.0])
    moments = torch.cat([mean, log_variance])[None, :, None, None].expand(1, 4, 200, 200).half()
    drawn = sample_latents(moments, 0.5, torch.Generator().manual_seed(0))
    assert drawn.shape == (1, 2, 200, 200) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.mean((0, 2, 3)), 0.5 * mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close(drawn.std((0, 2, 3)), 0.5 * (0.5 * log_variance).exp(), rtol=0.02, atol=0)
    extreme = torch.tensor([3.0, 3.0, -40.0, 40.0])[None, :, None, None].expand(1, 4, 50, 50).half()
    drawn = sample_latents(extreme, 1.0, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn[:, 0], torch.tensor(3.0)) and 0.9 < drawn[:, 1].std() / np.exp(10) < 1.1


TEXT = UViTConfig(img_size=8, in_chans=1, context_dim=8, num_context_tokens=12)
LATENT = UViTConfig(img_size=4, in_chans=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_text_encoder(folder, num_tokens=12, width=8)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    make_autoencoder(folder)
    return folder


def test_context_is_the_last_hidden_state_of_padded_captions(clip):
    """As the published text models were trained: no mask, padded and cut to one length."""
    captions = ["a cat", "", "a caption far longer than twelve letters", "a cat"]
    tokenizer, network = AutoTokenizer.from_pretrained(clip), CLIPTextModel.from_pretrained(clip)
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    assert tokens.shape == (4, 12)
    context = TextEncoder(str(clip))(captions)
    assert context.shape == (4, 12, 8) and not context.requires_grad
    torch.testing.assert_close(context, network(tokens).last_hidden_state.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(context[0], context[3]) and not torch.allclose(context[0], context[1])


def test_captions_beyond_the_cache_are_encoded_again(clip):
    """More than are kept: what was forgotten comes out the same again."""
    encoder = TextEncoder(str(clip))
    captions = [f"cat {number}" for number in range(CACHED_CAPTIONS + 44)]
    whole = encoder(captions)
    parts = torch.cat([encoder(captions[start : start + 7]) for start in range(0, len(captions), 7)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_whole_clip_gives_its_text_model(clip, tmp_path):
    text = CLIPTextModel.from_pretrained(clip)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    whole = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict()))
    whole.text_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    captions = ["a dog", ""]
    torch.testing.assert_close(TextEncoder(str(tmp_path))(captions), TextEncoder(str(clip))(captions))


def test_nothing_is_printed(clip, autoencoder, capfd):
    TextEncoder(str(clip))
    Autoencoder(str(autoencoder), 1.0)
    assert capfd.readouterr() == ("", "")


def test_decoding_divides_by_the_scale_factor_and_joins_slices(autoencoder, tmp_path):
    network = make_autoencoder(tmp_path)
    latents = torch.randn(11, 4, 4, 4)
    images = Autoencoder(str(autoencoder), 0.25).decode(latents)
    assert images.shape == (11, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(images, network.decode(latents / 0.25).sample, rtol=1e-5, atol=1e-5)


def test_only_the_encoders_that_a_run_needs_are_loaded(clip, autoencoder):
    assert load_encoders(DataConfig(), UViTConfig(in_chans=1)) == NO_ENCODERS
    encoders = load_encoders(DataConfig(text_encoder=str(clip)), TEXT)
    assert isinstance(encoders.text, TextEncoder) and encoders.image is None
    encoders = load_encoders(DataConfig(autoencoder=str(autoencoder), scale_factor=0.5), LATENT)
    assert encoders.text is None and encoders.image.scale_factor == 0.5
    with pytest.raises(InputError, match=r"in_chans 4 needs data.autoencoder to make images, got None"):
        load_encoders(DataConfig(), LATENT)


def test_encoders_that_do_not_fit_the_model_are_refused(clip, autoencoder):
    for model in (UViTConfig(context_dim=8, num_context_tokens=77), UViTConfig(context_dim=768, num_context_tokens=12)):
        expected = f"model.num_context_tokens {model.num_context_tokens} and model.context_dim {model.context_dim}"
        with pytest.raises(InputError, match=f"gives 12 tokens of width 8, expected {expected}"):
            load_encoders(DataConfig(text_encoder=str(clip)), model)
    with pytest.raises(InputError, match=r"has latents of 4 channels, expected model.in_chans 16"):
        load_encoders(DataConfig(autoencoder=str(autoencoder)), UViTConfig(in_chans=16))


@pytest.mark.parametrize("content", [b"", b"garbage", PICKLE])
def test_broken_weights(content, clip, autoencoder, tmp_path, capsys):
    for name, folder in (("text", clip), ("image", autoencoder)):
        broken = tmp_path / name
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(content if file.suffix == ".safetensors" else file.read_bytes())
    with pytest.raises(InputError, match=r"text encoder '.*text' cannot be loaded"):
        TextEncoder(str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"autoencoder '.*image' cannot be loaded"):
        Autoencoder(str(tmp_path / "image"), 1.0)
    assert WORDS not in capsys.readouterr().out


def test_pickles_are_not_read(clip, autoencoder, tmp_path, capsys):
    for name, folder, pickled in (
        ("text", clip, "pytorch_model.bin"),
        ("image", autoencoder, "diffusion_pytorch_model.bin"),
    ):
        (tmp_path / name).mkdir()
        for file in folder.glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / pickled).write_bytes(PICKLE)
    with pytest.raises(InputError, match="cannot be loaded"):
        TextEncoder(str(tmp_path / "text"))
    with pytest.raises(InputError, match="cannot be loaded"):
        Autoencoder(str(tmp_path / "image"), 1.0)
    assert WORDS not in capsys.readouterr().out


def test_weights_of_another_architecture_are_refused(clip, autoencoder, tmp_path):
    """Sizes may fit by chance; then the names of the tensors do not."""
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((autoencoder / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"is not a CLIP: it has no embeddings.position_embedding.weight"):
        TextEncoder(str(tmp_path))
    config = json.loads((autoencoder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"has weights of 15,223 values, expected 16,347 by its config.json"):
        Autoencoder(str(tmp_path), 1.0)


def test_unknown_names_are_refused(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"text encoder 'nobody/nothing' is not a folder on disk"):
        TextEncoder("nobody/nothing")
    with pytest.raises(InputError, match=r"autoencoder 'nobody/nothing/vae' is not a folder on disk"):
        Autoencoder("nobody/nothing/vae", 1.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    with pytest.raises(InputError, match=r"text encoder not found: encodr, did you mean 'encoder'?"):
        TextEncoder("encodr")
    with pytest.raises(InputError, match=r"text encoder 'encoder' has no config.json"):
        TextEncoder("encoder")


def test_missing_packages(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs the package transformers, which is not installed"):
        TextEncoder(str(clip))
