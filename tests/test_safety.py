"""Nothing that a file holds is run, takes memory that its weights do not need, or reaches the terminal as it is."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import refused
from helpers.encoders import make_autoencoder, make_text_encoder
from helpers.faults import on_event
from helpers.forks import in_a_fork
from helpers.malicious import write_malicious
from helpers.runs import TEXT, TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from uvit import UViT, UViTConfig
from uvit.common.errors import InputError, printable
from uvit.common.files import append_new_lines
from uvit.common.hub import find_folder
from uvit.config import MAX_JSON_BYTES, Config, DataConfig, from_dict, read_json, to_json
from uvit.data.latents import load_latents
from uvit.data.manifest import EMPTY_CONTEXT_FILE, Manifest, read_manifest, start_encoding, write_shard
from uvit.evaluation.features import build_features
from uvit.networks.encoders import Autoencoder, TextEncoder
from uvit.sampling.grid import image_grid
from uvit.training.checkpoint import STATE_FILE
from uvit.weights.tensors import read_pth


@pytest.fixture
def workdir(tmp_path, monkeypatch, offline) -> Path:
    """A folder with a config, a run that stands at a checkpoint, encoders and images; the hub is out of reach."""
    (tmp_path / "tiny.py").write_text(TINY)
    config = from_dict(Config, {"model": {"img_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}})
    UViT(config.model).save_pretrained(tmp_path / "run")
    (tmp_path / "run/config.json").write_text(to_json(config))
    make_text_encoder(tmp_path / "clip", num_tokens=24, width=8)
    make_autoencoder(tmp_path / "vae")
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


READ_IMAGES = "--reference images --features pixels"
PLACES = [
    ("train", "tiny.py --train.run_dir again", f"again/checkpoints/step_00000001/{STATE_FILE}"),
    ("train", f"tiny.py {' '.join(TEXT)} --data.text_encoder clip --train.run_dir new", "clip/model.safetensors"),
    ("train", "tiny.py --data.name npz.npz --train.run_dir new", "npz.npz"),
    ("train", "tiny.py --data.name pickled --train.run_dir new", "pickled/data.pkl"),
    ("train", "tiny.py --data.name scripted --train.run_dir new", "scripted/train.pickle"),
    ("sample", "--checkpoint run", "run/model.safetensors"),
    ("sample", "--checkpoint run", "run/config.json"),
    ("sample", "--checkpoint weights.pth --config tiny.py", "weights.pth"),
    ("sample", "--checkpoint reference --config tiny.py", "reference/nnet_ema.pth"),
    ("evaluate", "--checkpoint run --num_images 2 --steps 1 --reference ref.npz", "ref.npz"),
    ("evaluate", f"--images shown.npz {READ_IMAGES}", "shown.npz"),
    ("evaluate", "--images images --reference ref.npz --features pixels", "ref.npz"),
    ("evaluate", "--images images --reference images --features inception --feature_weights w.pth", "w.pth"),
    (
        "evaluate",
        "--images images --reference images --features timm:test_vit --feature_weights w.safetensors",
        "w.safetensors",
    ),
    ("evaluate", "--images images --reference images --features timm:test_vit --feature_weights w.bin", "w.bin"),
    (
        "evaluate",
        "--checkpoint run --num_images 2 --steps 1 --classifier timm:test_vit --classifier_weights w.pth",
        "w.pth",
    ),
    ("evaluate", "stats data.npz --output out.npz --features pixels", "data.npz"),
    ("encode", "--data images --image_size 8 --autoencoder binary --output out", "binary/diffusion_pytorch_model.bin"),
    (
        "encode",
        "--data images --image_size 8 --autoencoder vae --output out",
        "vae/diffusion_pytorch_model.safetensors",
    ),
    ("train", f"tiny.py {' '.join(TEXT)} --data.text_encoder binary --train.run_dir new", "binary/pytorch_model.bin"),
    ("encode", "--data images --image_size 8 --autoencoder vae --output begun", "begun/manifest.json"),
    ("convert", "weights.pth out", "weights.pth"),
]


@pytest.mark.parametrize(("name", "arguments", "place"), PLACES)
def test_a_pickle_is_never_run(name, arguments, place, workdir, monkeypatch, capsys):
    config, proof = (workdir / place).parent / "config.json", workdir / "proof"
    if config.parent.name == "binary":
        config.parent.mkdir()
        of = "vae" if "diffusion" in place else "clip"
        for file in (workdir / of).glob("*.json"):
            (config.parent / file.name).write_bytes(file.read_bytes())
    write_malicious(workdir / place, proof)
    if config.parent.name == "scripted":  # what data sets came with once
        (config.parent / "scripted.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    line = refused(name, arguments, monkeypatch, capsys)
    assert any(part in line for part in Path(place).parts), line  # it is that file which was refused
    assert not proof.exists()


def test_the_traps_of_these_tests_work(tmp_path):
    """A test of safety that could not fail would prove nothing."""
    for number, name in enumerate(("a.pth", "a.npz", "a.npy", "a.safetensors")):
        path, proof = tmp_path / name, tmp_path / str(number)
        write_malicious(path, proof)
        if name == "a.pth":
            torch.load(path, weights_only=False)
        elif name == "a.safetensors":
            pickle.loads(path.read_bytes())
        else:
            loaded = np.load(path, allow_pickle=True)
            _ = loaded["mu"] if name == "a.npz" else loaded
        assert proof.is_dir()


def test_a_context_that_is_a_pickle_is_not_read(tmp_path, monkeypatch):
    manifest = Manifest(
        source="x",
        num_images=2,
        shard_size=2,
        image_shape=(8, 8),
        latent_shape=(4, 4, 4),
        autoencoder="vae",
        encoder_hash="a",
        scale_factor=0.5,
        text_encoder="clip",
        text_encoder_hash="b",
        num_captions=1,
        context_shape=(24, 8),
    )
    start_encoding(tmp_path, manifest, torch.zeros(24, 8))
    with write_shard(tmp_path, manifest, 0) as add:
        moments, context = np.zeros((2, 2, 8, 4, 4), np.float16), np.zeros((2, 1, 24, 8), np.float16)
        add({"moments": moments, "label": np.zeros(2, np.int64), "captions": [["a"], ["b"]], "context": context})
    model = UViTConfig(img_size=4, in_chans=4, context_dim=8, num_context_tokens=24)
    data = DataConfig(name=str(tmp_path), autoencoder="vae", scale_factor=0.5)
    assert len(load_latents(data, model)) == 2
    write_malicious(tmp_path / EMPTY_CONTEXT_FILE, tmp_path / "proof")
    with pytest.raises(InputError, match=r"empty_context.npy cannot be read"):
        load_latents(data, model)
    assert not (tmp_path / "proof").exists()
    np.save(tmp_path / EMPTY_CONTEXT_FILE, np.zeros((24, 9), np.float16))
    with pytest.raises(InputError, match=r"must hold float16 numbers of shape \(24, 8\), got \(24, 9\) float16"):
        load_latents(data, model)


def test_a_malicious_cached_inception_is_not_run(tmp_path, monkeypatch):
    """What torch-fidelity keeps on disk."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    write_malicious(tmp_path / "hub/checkpoints" / URL_INCEPTION_V3.rpartition("/")[2], tmp_path / "proof")
    with pytest.raises(InputError, match="Weights only load failed"):
        build_features("inception", None, (3, 8, 8))
    assert not (tmp_path / "proof").exists()


@in_a_fork
def test_a_malicious_inception_that_replaces_a_checked_file_is_not_run(tmp_path, inception):
    """torch-fidelity reads it again."""
    path = shutil.copy(inception, tmp_path / "w.pth")
    write_malicious(tmp_path / "other.pth", tmp_path / "proof")
    on_event("read", lambda each: each == path, (tmp_path / "other.pth").replace, count=2)
    with pytest.raises(InputError, match="Weights only load failed"):
        build_features("inception", str(path), (3, 8, 8))
    assert not (tmp_path / "proof").exists()


@pytest.fixture
def little_memory():
    """Lets this process take 4 GB more than it has, so that a huge allocation fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


HUGE = [
    ({"embed_dim": 10**9}, "parameters, got up to "),
    ({"depth": 10**7}, "depth must be at most 1,000, got 10000000"),
    ({"img_size": 10**6}, "must give at most 524,288 tokens, got 250,000,000,001"),
    ({"img_size": [2, 10**15]}, "must give at most 524,288 tokens"),
    ({"patch_size": 10**6, "img_size": 10**6}, "parameters, got up to "),
    ({"in_chans": 10**5}, "do not fit their config: "),
    ({"num_classes": 10**9}, "do not fit their config: "),
    ({"mlp_ratio": 1e300}, "parameters, got up to "),
    ({"mlp_ratio": 1e7}, "do not fit their config: "),
    ({"embed_dim": 2**15}, "do not fit their config: "),
    ({"context_dim": 10**9, "num_context_tokens": 77}, "do not fit their config: "),
]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(("fields", "message"), HUGE)
@pytest.mark.usefixtures("little_memory")
def test_a_config_cannot_take_memory_that_its_weights_do_not_need(fields, message, workdir):
    config = read_json(workdir / "run/config.json")["model"]
    (workdir / "run/config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(InputError, match=message):
        UViT.from_pretrained("run")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(
    ("folder", "fields", "message"),
    [
        ("vae", {"latent_channels": 10**9}, "cannot be loaded"),
        ("vae", {"block_out_channels": [8, 100_000]}, "has weights of 15,223 values, expected "),
        ("vae", {"layers_per_block": 10**9}, "must have layers_per_block of at most 1,000"),
        ("clip", {"hidden_size": 10**9}, "cannot be loaded"),
        ("clip", {"vocab_size": 10**10}, "cannot be loaded"),
        ("clip", {"num_hidden_layers": 10**9}, "must have num_hidden_layers of at most 1,000"),
        ("clip", {"vocab_size": 5}, "has a vocabulary of 5, got a tokenizer with token 137"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_an_encoder_config_cannot_take_memory_that_its_weights_do_not_need(folder, fields, message, workdir):
    path = workdir / folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(InputError, match=message):
        Autoencoder(folder, 1.0) if folder == "vae" else TextEncoder(folder)


def test_an_autoencoder_without_one_of_its_weights_is_refused(workdir):
    path = workdir / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["other"] = weights.pop("decoder.conv_in.weight")
    save_file(weights, path)
    with pytest.raises(InputError, match=r"is not an AutoencoderKL: it has no decoder.conv_in.weight"):
        Autoencoder("vae", 1.0)


def test_a_tensor_that_repeats_one_stored_value_is_refused(tmp_path):
    torch.save({"pos_embed": torch.zeros(1).expand(1, 10**9, 10**3)}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"must hold all values of its tensors, 4,000,000,000,000 bytes, got 4"):
        read_pth(tmp_path / "a.pth")
    shared = torch.zeros(1000)
    torch.save({str(number): shared for number in range(9)}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"36,000 bytes, got 4,000"):
        read_pth(tmp_path / "b.pth")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="must hold plain tensors"):
        read_pth(tmp_path / "c.pth")


@pytest.mark.parametrize("shape", [[10**12], [2**63], [2**40, 2**40]])
def test_a_header_that_claims_huge_tensors(shape, workdir):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (workdir / "run/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        UViT.from_pretrained("run")


BAD_JSON = [
    ("[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
    ('{"train": {"seed": ' + "[" * 900 + "]" * 900 + "}}", "seed must be int, got "),
    ('{"optim": {"lr": NaN}}', "is not valid JSON: NaN is not allowed"),
    ('{"optim": {"lr": -Infinity}}', "is not valid JSON: -Infinity is not allowed"),
    ('{"train": {"seed": ' + "9" * 5000 + "}}", "is not valid JSON: Exceeds the limit"),
    ('{"train": {"seed": 1, "seed": 2}}', "is not valid JSON: 'seed' appears twice"),
    ('{"train": {"seed": true}}', "seed must be int, got True"),
    ('{"train": {"seed": 1e3}}', "seed must be int, got 1000.0"),
    ('{"data": {"name": "a\\u001b[31m"}}', r"name must be plain text in one line, got 'a\x1b[31m'"),
    ('{"data": {"name": "a\\nb"}}', "name must be plain text in one line"),
    ('{"data": {"name": "a\\u202eb"}}', "name must be plain text in one line"),
    ('{"sample": {"prompts": ["\\ud800"]}}', "prompts must be text without null characters"),
    ('{"data": {"num_workers": 100000}}', "num_workers must be at most 1,024, got 100000"),
    ('{"train": {"num_threads": 100000}}', "num_threads must be at most 1,024, got 100000"),
    ('{"sample": {"num_steps": 1000000000}}', "num_steps must be at most 100,000, got 1000000000"),
    ('{"process": {"loss_space": "nois"}}', "loss_space must be "),
    ("\udcff", "is not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_invalid_json_is_refused_in_one_line(text, message, workdir, monkeypatch, capsys):
    (workdir / "run/config.json").write_bytes(text.encode(errors="surrogateescape"))
    (workdir / "run/checkpoints").mkdir()
    line = refused("train", "tiny.py --train.run_dir run", monkeypatch, capsys)
    assert message in line and len(line) < 500 and printable(line) == line


def test_a_huge_json_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match="must have at most 67,108,864 bytes, got more"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"num_images": 2**62}, "must give at most 100,000 shards"),
        ({"latent_shape": [4, 10**9, 4]}, "latent_shape must be 1 to 16,384 each"),
        ({"flips": 0}, "flips must be 1 to 2, got 0"),
        ({"context_shape": [-1, 8]}, "context_shape must be 0 to 524,288 each"),
        ({"source": "a\x1b]0;x\x07"}, "source must be plain text in one line"),
    ],
)
def test_an_invalid_manifest_is_refused(fields, message, tmp_path):
    whole = {"source": "x", "num_images": 2, "shard_size": 2, "image_shape": [8, 8], "latent_shape": [4, 4, 4]}
    whole |= {"autoencoder": "a", "encoder_hash": "b", "scale_factor": 0.5}
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    assert read_manifest(tmp_path).num_shards == 1
    (tmp_path / "manifest.json").write_text(json.dumps({**whole, **fields}))
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["user/model/../../..", "../nowhere", "user/..", "n" * 300, "a/" + "n" * 300])
def test_names_do_not_lead_out_of_the_hubs_folder(name, workdir):
    with pytest.raises(InputError, match=r"not found: |is not a folder on disk"):
        find_folder(name, "checkpoint", ("*",))


def test_names_of_data_are_neither_acted_on_nor_made_paths(tmp_path, capsys):
    """A class whose name is a path with terminal escapes is drawn, listed and printed as plain text."""
    name = "../../\x1b[31mred\nline\ud800"
    picture = image_grid(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 1, [name, "b"])
    assert picture.size[0] > 66
    (line,) = append_new_lines(tmp_path / "skipped.txt", [f"image 1 ({name})"])
    assert line == r"image 1 (../../\x1b[31mred line\ud800)" == (tmp_path / "skipped.txt").read_text().strip()
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.txt"]
