from __future__ import annotations

import dataclasses
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.latents import MANIFEST, latent_config, write_latents

from uvit.common.errors import InputError
from uvit.config import UViTConfig
from uvit.data.latents import load_latents
from uvit.data.manifest import EMPTY_CONTEXT_FILE, start_encoding, write_shard

LABELLED = UViTConfig(img_size=4, in_chans=2, num_classes=2)
TEXT = UViTConfig(img_size=4, in_chans=2, context_dim=6, num_context_tokens=5)


@pytest.fixture
def folder(tmp_path):
    """Ten rows in three shards."""
    write_latents(tmp_path)
    return tmp_path


def test_rows_are_read_by_position(folder):
    data = load_latents(latent_config(folder), LABELLED)
    assert len(data) == 10 and data.class_names == ("a", "b")
    batch = data.read([9, 0, 3, 4, 3], np.random.default_rng(0))
    assert batch.images.shape == (5, 4, 4, 4) and batch.images.dtype == torch.float16
    assert batch.images.flatten(1).unique(dim=1).flatten().tolist() == [9, 0, 3, 4, 3]
    assert batch.labels.tolist() == [1, 0, 1, 0, 1] and batch.captions == [] and batch.context is None


def test_mirror_images_are_drawn_where_asked(folder):
    data = load_latents(latent_config(folder, flip=True), LABELLED)
    drawn = data.read([2] * 200, np.random.default_rng(0)).images[:, 0, 0, 0]
    assert set(drawn.tolist()) == {2.0, 2.5} and 70 < (drawn == 2.5).sum() < 130
    assert torch.equal(drawn, data.read([2] * 200, np.random.default_rng(0)).images[:, 0, 0, 0])


def test_a_caption_comes_with_its_own_features(folder):
    data = load_latents(latent_config(folder), TEXT)
    batch = data.read([1] * 60 + [7], np.random.default_rng(0))
    share = {"x": 0.0, "y": 0.25, "z": 0.75}
    for (caption,), context in zip(batch.captions, batch.context):
        index, text = caption.split()
        assert context.shape == (5, 6) and context.unique().tolist() == [int(index) + share[text]]
    assert {caption for (caption,) in batch.captions} == {"1 x", "1 y", "1 z", batch.captions[-1][0]}
    assert batch.captions[-1][0].startswith("7 ")
    assert batch.empty_context.shape == (1, 5, 6) and batch.empty_context.unique().tolist() == [-1]


def test_latent_data_can_be_pickled_for_workers(folder):
    data = load_latents(latent_config(folder), TEXT)
    copy = pickle.loads(pickle.dumps(data))
    ours, theirs = (each.read([1, 8], np.random.default_rng(0)) for each in (data, copy))
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.context, theirs.context)


def test_shards_are_read_by_datasets(folder):
    rows = datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("shard*"))]
    )
    assert rows.num_rows == 10 and rows.features["label"].names == ["a", "b"]
    assert rows[6]["captions"] == ["6 x", "6 y", "6 z"] and set(rows[6]["moments"]) == {6.0, 6.5}


def test_latents_that_do_not_fit_the_config_are_refused(folder):
    for model, fields, message in (
        (dataclasses.replace(LABELLED, img_size=8), {}, r"img_size\) \(2, 4, 4\), got \(2, 8, 8\)"),
        (dataclasses.replace(LABELLED, in_chans=4), {}, r"img_size\) \(2, 4, 4\), got \(4, 4, 4\)"),
        (LABELLED, {"scale_factor": 0.18215}, "encoded with data.scale_factor 0.5, got 0.18215"),
        (LABELLED, {"crop": "random"}, "encoded with data.crop center, got random"),
        (LABELLED, {"autoencoder": None}, "has latents of autoencoder 'vae', got data.autoencoder None"),
        (dataclasses.replace(TEXT, context_dim=7), {}, r"context_dim\) \(5, 6\), got \(5, 7\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_latents(latent_config(folder, **fields), model)


def test_missing_and_broken_shards(folder):
    middle = folder / MANIFEST.shard_file(1)
    whole = middle.read_bytes()
    with pa.memory_map(str(middle)) as mapped:
        stream = pa.ipc.open_stream(mapped)
        stream.read_next_batch()
        between_messages = mapped.tell()
    assert len(load_latents(latent_config(folder), LABELLED)) == 10 and between_messages < len(whole) - 8
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[:between_messages], whole[:-8]):
        middle.write_bytes(content)
        with pytest.raises(InputError, match=r"shard-00001-of-00003.arrow is not a complete shard of latents"):
            load_latents(latent_config(folder), LABELLED)
    middle.write_bytes(whole)
    (folder / EMPTY_CONTEXT_FILE).write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"empty_context.npy cannot be read \(.*run the same encode.py command again"):
        load_latents(latent_config(folder), TEXT)
    np.save(folder / EMPTY_CONTEXT_FILE, np.zeros((5, 7), np.float16))
    with pytest.raises(
        InputError, match=r"empty_context.npy must hold float16 numbers of shape \(5, 6\), got \(5, 7\) float16"
    ):
        load_latents(latent_config(folder), TEXT)
    middle.unlink()
    with pytest.raises(InputError, match=r"has 2 of 3 shards, shard-00001-of-00003.arrow is not there: run the same"):
        load_latents(latent_config(folder), LABELLED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_shape": (2, 2, 4)}, r"moments of type .*\[128\], got .*\[64\]"),
        ({"context_shape": (5, 7)}, r"context of type .*\[90\], got .*\[105\]"),
        ({"num_captions": 0}, "captions of type .*, got None"),
        ({"shard_size": 8}, "must have 4 rows at most, got 8"),
        ({"encoder_hash": "xyz"}, 'is of another encoding: encoder_hash must be "abc", got "xyz"'),
        ({"text_encoder_hash": "xyz"}, 'text_encoder_hash must be "def", got "xyz"'),
        ({"image_shape": (8, 9)}, r"image_shape must be \[8, 8\], got \[8, 9\]"),
        ({"caption_column": "text"}, 'caption_column must be null, got "text"'),
        ({"source": "other"}, 'source must be "made up", got "other"'),
    ],
)
def test_a_shard_of_another_encoding_is_refused(folder, tmp_path_factory, fields, message):
    """It replaces one of the shards."""
    other, elsewhere = dataclasses.replace(MANIFEST, **fields), tmp_path_factory.mktemp("other")
    size = min(other.shard_size, other.num_images)
    columns = {
        "moments": np.zeros((size, 2, *other.moments_shape), np.float16),
        "label": np.zeros(size, np.int64),
        "captions": [["x"] * 3] * size,
        "context": np.zeros((size, 3, *other.context_shape), np.float16),
    }
    with write_shard(elsewhere, other, 0) as add:
        add(columns)
    (elsewhere / other.shard_file(0)).replace(folder / MANIFEST.shard_file(1))
    with pytest.raises(InputError, match=rf"shard-00001-of-00003.arrow .*{message}"):
        load_latents(latent_config(folder), LABELLED)


def test_one_version_of_each_image_is_not_mirrored(tmp_path):
    once = dataclasses.replace(MANIFEST, flips=1, num_images=2, num_captions=0)
    start_encoding(tmp_path, once, None)
    with write_shard(tmp_path, once, 0) as add:
        add({"moments": np.ones((2, 1, 4, 4, 4), np.float16), "label": np.array([0, 1])})
    assert len(load_latents(latent_config(tmp_path), LABELLED)) == 2
    with pytest.raises(InputError, match=r"was encoded without mirror images, got data\.flip True"):
        load_latents(latent_config(tmp_path, flip=True), LABELLED)
