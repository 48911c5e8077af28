from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uvit.common.errors import InputError
from uvit.weights.tensors import hash_weights, read_pth, read_weights, write_weights

WEIGHTS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2])}


def test_a_hash_depends_on_names_and_values_only():
    found = hash_weights(WEIGHTS)
    assert len(found) == 16 and int(found, 16) >= 0
    assert hash_weights(dict(sorted(WEIGHTS.items()))) == found  # whatever their order
    assert hash_weights({**WEIGHTS, "a": WEIGHTS["a"].double()}) == found  # and precision
    assert hash_weights({**WEIGHTS, "b": WEIGHTS["b"].clone().requires_grad_()}) == found
    for other in ({**WEIGHTS, "a": torch.tensor([1, 3])}, {"b": WEIGHTS["b"]}, {"c": WEIGHTS["a"], "b": WEIGHTS["b"]}):
        assert hash_weights(other) != found


def test_written_weights_are_read_unchanged(tmp_path):
    """Views and parameters, too."""
    weights = {**WEIGHTS, "view": torch.arange(8.0).reshape(4, 2).T, "parameter": torch.nn.Parameter(torch.ones(2))}
    write_weights(tmp_path, weights)
    read = read_weights(tmp_path / "model.safetensors")
    assert read.keys() == weights.keys() and all(torch.equal(read[name], each) for name, each in weights.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        # Other libraries ask for the format.
        assert file.metadata() == {"format": "pt", "hash": hash_weights(weights)}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_same_weights_are_the_same_file(tmp_path):
    """The library orders its metadata anew each time; names beyond ASCII keep the header's size."""
    files = set()
    for _ in range(16):
        write_weights(tmp_path, {**WEIGHTS, "größe": torch.ones(1)})
        files.add((tmp_path / "model.safetensors").read_bytes())
    assert len(files) == 1
    assert read_weights(tmp_path / "model.safetensors").keys() == {"a", "b", "größe"}


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path):
    write_weights(tmp_path, {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)})
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")  # the header
    for place in range(start, len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(InputError, match=r"is damaged, its weights must have hash \w{16}, got \w{16}: copy"):
                read_weights(path)
    save_file({"a": torch.ones(2)}, path)  # of another program, which writes no hash
    assert torch.equal(read_weights(path)["a"], torch.ones(2))


def test_a_state_dict_of_the_reference_code_is_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "nnet_ema.pth")
    read = read_pth(tmp_path / "nnet_ema.pth")
    assert all(torch.equal(read[name], each) for name, each in WEIGHTS.items())


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no weights at .*none.safetensors"):
        read_weights(tmp_path / "none.safetensors")
