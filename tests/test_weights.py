from __future__ import annotations

import pickle
import sys

import pytest
import torch
from golden import FACTS, config_of, golden_model
from malicious import PICKLE, WORDS
from safetensors.torch import load_file, save_file

from uvit import UViT
from uvit.common.cli import run
from uvit.common.errors import InputError
from uvit.training.checkpoint import main
from uvit.weights.published import infer_config


@pytest.fixture
def saved(tiny, tmp_path):
    UViT(tiny, num_classes=5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_missing_weights(saved, tmp_path):
    with pytest.raises(InputError, match="checkpoint not found: "):
        UViT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*config.json: No such file"):
        UViT.from_pretrained(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights at .*model.safetensors"):
        UViT.from_pretrained(saved)


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is not a folder on disk, and cannot be fetched"):
        UViT.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("content", [b"", b"garbage", PICKLE])
def test_broken_weights(saved, content, capsys):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        UViT.from_pretrained(saved)
    assert WORDS not in capsys.readouterr().out


def test_truncated_weights(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        UViT.from_pretrained(saved)


@pytest.mark.parametrize("fields", [{}, {"pos_embed": "sincos2d", "patch_embed": "conv", "conv": "none"}])
def test_loading_draws_no_random_numbers_and_leaves_weights_of_its_own(tiny, fields, tmp_path):
    model = UViT(tiny, **fields).eval()
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = UViT.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    x, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(loaded(x, timesteps), model(x, timesteps))
    assert all(each.requires_grad and each.untyped_storage().nbytes() == each.nbytes for each in loaded.parameters())


def test_halved_weights_load_in_full_precision(saved):
    halves = {name: tensor.bfloat16() for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(halves, saved / "model.safetensors")
    loaded = UViT.from_pretrained(saved).state_dict()
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in loaded.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_weights_of_another_shape(saved, tiny):
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(config.replace('"num_classes": 5', '"num_classes": 6'))
    with pytest.raises(InputError, match=r"do not fit their config: .*label_emb.weight.*\[5, 32\].*\[6, 32\]"):
        UViT.from_pretrained(saved)
    (saved / "config.json").write_text(config.replace('"qk_norm": false', '"qk_norm": true'))
    with pytest.raises(InputError, match=r"do not fit their config: .*q_norm.weight"):
        UViT.from_pretrained(saved)


def known_of(name):
    """What the tensors of a published model do not tell."""
    config = config_of(FACTS["parameter_counts"][name]["kwargs"])
    if not name.startswith("tiny"):
        return {}
    return {"num_heads": config.num_heads, "num_context_tokens": config.num_context_tokens}


@pytest.mark.parametrize("name", FACTS["parameter_counts"])
def test_sizes_are_read_off_the_tensors(name):
    config = config_of(FACTS["parameter_counts"][name]["kwargs"])
    with torch.device("meta"):
        weights = UViT(config).state_dict()
    inferred = infer_config(weights, **known_of(name))
    if config.num_classes == 1001:
        assert (inferred.num_classes, inferred.null_class) == (1000, True)
        inferred = infer_config(weights, null_class=False)
    assert inferred == config


@pytest.fixture
def published(tmp_path):
    """A checkpoint folder of the reference code."""
    folder = tmp_path / "500000.ckpt"
    folder.mkdir()
    torch.save(golden_model("tiny_class").state_dict(), folder / "nnet_ema.pth")
    return folder


def test_published_files_and_folders_load(published):
    expected = golden_model("tiny_class").state_dict()
    for path in (published, published / "nnet_ema.pth"):
        model = UViT.from_pretrained(path, num_heads=4, null_class=True)
        assert model.config.null_label == 10
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_help_lists_the_commands(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"{name:<8} " in printed for name in ("convert", "export", "push", "card"))


def test_convert(published, tmp_path, capsys):
    out = tmp_path / "converted"
    main(["convert", str(published), str(out), "--num_heads", "4"])
    assert "77,440 parameters, 5 blocks of width 32" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    expected = golden_model("tiny_class").state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in UViT.from_pretrained(out).state_dict().items())


def bad_published(kind, whole):
    if kind == "resnet":
        return {"conv1.weight": torch.zeros(4, 3, 7, 7)}
    if kind == "wider":
        return {**whole, "mid_block.attn.proj.weight": torch.zeros(3, 3)}
    if kind == "numbered":
        return {**whole, 3: torch.zeros(3)}
    if kind == "list":
        return [torch.zeros(3)]
    if kind == "flat":
        return {**whole, "patch_embed.proj.weight": torch.zeros(3, 4)}
    if kind == "empty":
        return {**whole, "pos_embed": torch.zeros(1, 0, 32)}
    return {"state": whole}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("garbage", "is not a valid weights-only file"),
        ("truncated", "is not a valid weights-only file"),
        ("plain", "is not a valid weights-only file"),
        ("malicious", "is not a valid weights-only file"),
        ("nested", "must hold tensors by name, got OrderedDict by 'state'"),
        ("numbered", "must hold tensors by name, got Tensor by 3"),
        ("list", "must hold tensors by name, got list"),
        ("flat", "patch_embed.proj.weight must have 4 dimensions, got shape (3, 4)"),
        ("empty", "pos_embed must have 3 dimensions, got shape (1, 0, 32)"),
        ("resnet", "not the weights of a U-ViT: there is no tensor 'pos_embed'"),
        ("wider", "do not fit their config: "),
        ("heads", "num_heads must be given for embed_dim 32"),
        ("command", "the first argument must be one of convert, export, push, card, got 'turn'"),
    ],
)
def test_bad_published_files_are_one_line_each(kind, message, published, tmp_path, monkeypatch, capsys):
    path = published / "nnet_ema.pth"
    if kind in ("garbage", "truncated", "malicious"):
        whole = path.read_bytes()
        path.write_bytes({"garbage": b"garbage", "truncated": whole[: len(whole) // 2], "malicious": PICKLE}[kind])
    elif kind == "plain":
        path.write_bytes(pickle.dumps({"a": print}, protocol=4))
    elif kind not in ("heads", "command"):
        torch.save(bad_published(kind, torch.load(path, weights_only=True)), path)
    heads = [] if kind == "heads" else ["--num_heads", "4"]
    command = "turn" if kind == "command" else "convert"
    monkeypatch.setattr(sys, "argv", ["checkpoint", command, str(path), str(tmp_path / "out"), *heads])
    with pytest.raises(SystemExit) as exit:
        run(main)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and WORDS not in printed.out
    assert printed.err.count("\n") == 1 and message in printed.err
    assert not (tmp_path / "out").exists()
