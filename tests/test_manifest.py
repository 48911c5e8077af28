from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.latents import MANIFEST, latent_config, latent_row, write_latents

from uvit.common.errors import InputError
from uvit.config import UViTConfig
from uvit.data.latents import load_latents
from uvit.data.manifest import (
    EMPTY_CONTEXT_FILE,
    check_same_encoding,
    is_latent_data,
    read_manifest,
    start_encoding,
    write_shard,
)

LABELLED = UViTConfig(img_size=4, in_chans=2, num_classes=2)


@pytest.fixture
def folder(tmp_path):
    """Ten rows in three shards."""
    write_latents(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard_size", 0, "shard_size must be at least 1, got 0"),
        ("num_images", 0, "num_images must be at least 1, got 0"),
        ("image_shape", [8, 0], r"image_shape must be 1 to 16,384 each, got \(8, 0\)"),
        ("latent_shape", [-2, 4, 4], r"latent_shape must be 1 to 16,384 each, got \(-2, 4, 4\)"),
        ("flips", 3, "flips must be 1 to 2, got 3"),
        ("scale_factor", 0, "scale_factor must be above 0, got 0"),
        ("num_captions", -1, "num_captions must be 0 to 524,288, got -1"),
        ("context_shape", [0, 6], r"context_shape must be positive where there are captions, got \(0, 6\)"),
        ("encoder_hash", None, "Manifest must have a field 'encoder_hash', got source, fingerprint"),
    ],
)
def test_an_invalid_manifest_is_refused(folder, field, value, message):
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["uvit_hash"]
    changed = {name: was if name != field else value for name, was in raw.items() if (name, value) != (field, None)}
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=rf"manifest.json: {message}"):
        load_latents(latent_config(folder), LABELLED)


def test_a_shard_is_complete_or_absent(tmp_path):
    start_encoding(tmp_path, MANIFEST, None)
    moments, label, captions, context = latent_row(0)
    with pytest.raises(KeyboardInterrupt), write_shard(tmp_path, MANIFEST, 0) as add:
        add({"moments": moments[None], "label": np.array([label]), "captions": [captions], "context": context[None]})
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_encoding_resumes_only_with_the_same_settings(folder):
    assert is_latent_data(folder) and read_manifest(folder) == MANIFEST
    check_same_encoding(folder, dataclasses.replace(MANIFEST, autoencoder="elsewhere/vae", versions=("torch 3",)))
    for field, value in {"encoder_hash": "xyz", "scale_factor": 1.0, "num_images": 11, "source": "other"}.items():
        with pytest.raises(InputError, match=rf"was started with {field} .*, got {value!r}: use another --output"):
            check_same_encoding(folder, dataclasses.replace(MANIFEST, **{field: value}))


def test_a_manifest_lists_the_versions_that_encoded_it(tmp_path):
    for name, versions in (("vae", ("uvit 1", "torch 2")), ("elsewhere/vae", ("uvit 1", "torch 3"))):
        start_encoding(tmp_path, dataclasses.replace(MANIFEST, autoencoder=name, versions=versions), None)
    expected = dataclasses.replace(MANIFEST, autoencoder="vae", versions=("uvit 1", "torch 2", "torch 3"))
    assert read_manifest(tmp_path) == expected


def test_starting_again_removes_leftovers(folder):
    (folder / ".shard-00001-of-00003-77.arrow").write_bytes(b"half")
    before = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    start_encoding(folder, MANIFEST, torch.zeros(5, 6))
    assert sorted(path.name for path in folder.iterdir()) == before and EMPTY_CONTEXT_FILE in before
